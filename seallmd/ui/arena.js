// The map of a device's memory: a grid of cells, one after the other from the first block to the last.

import { $, el, keyed, paper, say } from "./dom.js";
import { bytes, colour, plural, serviceColour, serviceVariable } from "./looks.js";

const WORDS = {
  weights: "weights", copying: "weights on their way", kv: "KV", promised: "promised, still empty",
  cached: "cached prefix, free for others", free: "free",
};
const MAP_HEIGHT = 200;
const [LEAST_PITCH, MOST_PITCH] = [5, 15];

const views = new Map();
let chosen = ""; // the service whose cells stand out
let redrawAll = () => {};

export function drawDevices(frame) {
  redrawAll = () => drawDevices(frame);
  const byDevice = new Map(frame.devices.map((device) => [device.status.device, device]));
  keyed($("device-list"), views, [...byDevice.keys()], (device) => new DeviceView(device));
  for (const [key, view] of views) view.show(byDevice.get(key), frame);
}

class DeviceView {
  constructor(device) {
    this.title = el("h3");
    this.label = el("span", { class: "quiet" });
    this.sums = el("span", { class: "quiet" });
    this.canvas = el("canvas", { role: "img" });
    this.chips = el("ul", { class: "holdings" });
    this.chipViews = new Map();
    const header = el("header", {}, this.title, this.label, this.sums);
    this.node = el("article", { class: "card device" }, header, this.canvas, this.chips);
    say(this.title, `Device ${device}`);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => { $("tip").hidden = true; });
  }

  show(device, frame) {
    [this.device, this.blockBytes] = [device, frame.block_bytes];
    const { status } = device;
    const up = status.state === "up";
    say(this.label, up ? status.label : `${status.label} · ${status.state}`);
    const free = `${bytes(status.free_bytes)} free of ${bytes(status.capacity_bytes)}`;
    say(this.sums, device.claim ? `${free}, kept for ${device.claim}` : free);
    this.canvas.setAttribute("aria-label", this.describe());
    this.draw();
    this.showChips(device);
  }

  describe() {
    const parts = this.device.holdings.map(
      (held) => `${held.service}: weights ${this.size(held.weights)}, KV ${this.size(held.kv)}`,
    );
    const free = `free ${bytes(this.device.status.free_bytes)}`;
    return `Memory of device ${this.device.status.device}. ${[...parts, free].join("; ")}`;
  }

  size(blocks) {
    return bytes(blocks * this.blockBytes);
  }

  /** Every service on the device, and its memory; a button that makes its cells stand out. */
  showChips({ holdings }) {
    const byName = new Map(holdings.map((held) => [held.service, held]));
    keyed(this.chips, this.chipViews, [...byName.keys()], (name) => new Chip(name));
    for (const [name, chip] of this.chipViews) {
      const held = byName.get(name);
      const kv = held.kv + held.promised;
      const promised = held.promised ? `, ${this.size(held.promised)} of it promised` : "";
      chip.show(`${this.size(held.weights)} weights${kv ? ` · ${this.size(kv)} KV${promised}` : ""}`);
    }
  }

  draw() {
    const { cells, cell_count: count } = this.device;
    const width = this.canvas.clientWidth;
    if (!count || !width) return;
    const fit = Math.floor(Math.sqrt((width * MAP_HEIGHT) / count));
    const pitch = Math.min(MOST_PITCH, Math.max(LEAST_PITCH, fit));
    this.columns = Math.max(1, Math.floor(width / pitch));
    this.pitch = width / this.columns;
    const { context } = paper(this.canvas, Math.ceil(count / this.columns) * this.pitch);
    let cell = 0;
    for (const [kind, service, length] of cells) {
      context.fillStyle = context.strokeStyle = inkOf(kind, service);
      context.globalAlpha = chosen && chosen !== service ? 0.22 : 1;
      if (kind === "copying") context.globalAlpha *= 0.4;
      for (const last = cell + length; cell < last; cell += 1) {
        const [column, row] = [cell % this.columns, Math.floor(cell / this.columns)];
        paint(context, kind, column * this.pitch, row * this.pitch, this.pitch);
      }
    }
    context.globalAlpha = 1;
  }

  /** What is under the pointer. */
  point(event) {
    if (!this.columns) return;
    const column = Math.min(this.columns - 1, Math.floor(event.offsetX / this.pitch));
    let cell = Math.floor(event.offsetY / this.pitch) * this.columns + column;
    const at = cell;
    const found = this.device.cells.find(([, , length]) => (cell -= length) < 0);
    const tip = $("tip");
    tip.hidden = !found;
    if (!found) return;
    const [kind, service] = found;
    const scale = this.device.blocks / this.device.cell_count;
    const [first, last] = [Math.ceil(at * scale), Math.ceil((at + 1) * scale) - 1];
    const blocks = first >= last ? `block ${first}` : `blocks ${first} to ${last}`;
    say(tip, `${service ? `${service}: ` : ""}${WORDS[kind] ?? kind} (${blocks})`);
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  }
}

class Chip {
  constructor(name) {
    this.name = name;
    const swatch = el("span", { class: "swatch" });
    swatch.style.setProperty("--colour", serviceVariable(name));
    this.memory = el("span", { class: "quiet" });
    const choose = () => {
      chosen = chosen === name ? "" : name;
      redrawAll();
    };
    this.button = el("button", { class: "chip", type: "button", click: choose }, swatch, name, this.memory);
    this.node = el("li", {}, this.button);
  }

  show(memory) {
    say(this.memory, memory);
    this.button.setAttribute("aria-pressed", String(chosen === this.name));
  }
}

function inkOf(kind, service) {
  if (kind === "free") return colour("faint");
  return kind === "cached" ? colour("cached") : serviceColour(service);
}

/** One cell at x, y: what it is shows in its shape. */
function paint(context, kind, x, y, pitch) {
  const inner = pitch - 1;
  const [middleX, middleY] = [x + inner / 2, y + inner / 2];
  if (kind === "weights" || kind === "copying" || kind === "free") {
    context.fillRect(x, y, inner, inner);
    return;
  }
  context.beginPath();
  if (kind === "promised") {
    context.lineWidth = Math.max(1, pitch / 8);
    context.arc(middleX, middleY, inner / 2 - context.lineWidth / 2 - 0.25, 0, 2 * Math.PI);
    context.stroke();
  } else {
    context.arc(middleX, middleY, kind === "cached" ? inner * 0.22 : inner * 0.5, 0, 2 * Math.PI);
    context.fill();
  }
}

/** How many devices are up, in words; empty when all are. */
export function deviceTrouble(frame) {
  const down = frame.devices.filter((device) => device.status.state !== "up");
  return down.length ? `${plural(down.length, "device")} not up` : "";
}
