// Colours and the writing of quantities: one place for both.

const COLOURS = 10;
let styles = getComputedStyle(document.documentElement);
const order = new Map();

/** A colour of the style sheet by name, in the scheme of now. */
export const colour = (name) => styles.getPropertyValue(`--${name}`).trim();

/** Services keep the colour of their place in the configuration. */
export function setServices(names) {
  names.forEach((name, index) => order.set(name, index % COLOURS));
}

export const serviceColour = (name) => colour(order.has(name) ? `s${order.get(name)}` : "quiet");

/** The same for style sheets, which follow the scheme by themselves. */
export const serviceVariable = (name) => (order.has(name) ? `var(--s${order.get(name)})` : "var(--quiet)");

/** Call back when the scheme changes, or the page gets another width: what is on canvases is drawn again. */
export function onLooks(redraw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    styles = getComputedStyle(document.documentElement);
    redraw();
  });
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(document.body);
}

/** "512 KiB", "1.2 GiB". */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < 4) {
    count /= 1024;
    unit += 1;
  }
  return `${count.toFixed(count >= 100 || unit === 0 ? 0 : 1)} ${units[unit]}`;
}

/** "85 ms", "1.4 s"; a dash for nothing. */
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.0095) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 0.9995) return `${(value * 1000).toFixed(0)} ms`;
  return value < 9.95 ? `${value.toFixed(1)} s` : `${value.toFixed(0)} s`;
}

/** "1.2k" for figures without a unit. */
export function amount(value) {
  if (value >= 9999.5) return `${(value / 1000).toFixed(0)}k`;
  if (value >= 999.5) return `${(value / 1000).toFixed(1)}k`;
  return value >= 9.95 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** A moment as the clock on the wall shows it. time: seconds since 1970. */
export const clock = (time) => new Date(time * 1000).toLocaleTimeString([], { hour12: false });
