// Small helpers for the document. Text goes in as text nodes alone: names and answers are never markup.

export const $ = (id) => document.getElementById(id);

/** An element with attributes (a function is a listener) and children (strings become text). */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Set a node's text, leaving it alone where nothing changed: selections and readers stay undisturbed. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Keep one view per key in `parent`, in order. make(key) gives {node, ...}; views of gone keys leave. */
export function keyed(parent, views, keys, make) {
  for (const [key, view] of views) {
    if (!keys.includes(key)) {
      view.node.remove();
      views.delete(key);
    }
  }
  keys.forEach((key, index) => {
    if (!views.has(key)) views.set(key, make(key));
    const { node } = views.get(key);
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
  return views;
}

/** A canvas's 2D context, cleared and scaled to the screen's pixels, with its size in CSS pixels. */
export function paper(canvas, height = canvas.clientHeight) {
  const width = canvas.clientWidth;
  const ratio = window.devicePixelRatio || 1;
  if (canvas.clientHeight !== height) canvas.style.height = `${height}px`;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}
