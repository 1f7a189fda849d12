// What happened when: a lane per service that shows where it was, and the list of events.

import { timeAxis } from "./chart.js";
import { $, el, paper, say } from "./dom.js";
import { clock, colour, serviceColour, serviceVariable } from "./looks.js";

const [LANE, BAR, LEAST_BAR] = [30, 11, 3];
const LOADING = ["reading", "copying"];
const MARKS = { failure: "bad", device: "bad", daemon: "bad", preemption: "warn" };

let shown = "";

export function drawTimeline(feed) {
  drawLanes(feed);
  drawEvents(feed);
}

function drawLanes({ latest, samples, happenings }) {
  const canvas = $("lanes");
  const names = latest.services.map((card) => card.status.name);
  const { context, width, height } = paper(canvas, names.length * LANE + 26);
  const span = latest.window_seconds;
  const end = samples.at(-1)?.time ?? 0;
  const x = (time) => width - 2 - ((end - time) / span) * (width - 2);
  names.forEach((name, index) => {
    const y = index * LANE;
    context.fillStyle = colour("quiet");
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "left";
    context.textBaseline = "top";
    context.fillText(name, 0, y + 1, width);
    context.fillStyle = colour("line");
    context.fillRect(0, y + LANE - BAR / 2 - 3, width, 1);
    for (const { state, from, to } of stretches(samples, name)) {
      paint(context, state, serviceColour(name), x(from), y + LANE - BAR - 3, x(to) - x(from));
    }
  });
  for (const { time, kind, service } of happenings) {
    const lane = names.indexOf(service);
    if (MARKS[kind] && time > end - span) mark(context, x(time), lane, height, colour(MARKS[kind]));
  }
  timeAxis(context, 0, width, height - 22, span);
  canvas.setAttribute("aria-label", `Where services were in the last minutes. ${describe(latest)}`);
}

/** Runs of samples in which a service was in one state. */
function stretches(samples, name) {
  const found = [];
  for (const { time, services } of samples) {
    const state = services[name]?.[0] ?? "absent";
    const last = found.at(-1);
    if (last) last.to = time;
    if (last?.state !== state) found.push({ state, from: time, to: time });
  }
  return found;
}

function paint(context, state, ink, left, top, width) {
  const length = Math.max(LEAST_BAR, width);
  context.fillStyle = context.strokeStyle = ink;
  if (state === "resident") {
    context.beginPath();
    context.roundRect(left, top, length, BAR, 3);
    context.fill();
  } else if (state === "draining") {
    context.lineWidth = 2;
    context.strokeRect(left + 1, top + 1, Math.max(1, length - 2), BAR - 2);
  } else if (LOADING.includes(state)) {
    hatch(context, left, top, length);
  }
}

function hatch(context, left, top, length) {
  context.save();
  context.beginPath();
  context.rect(left, top, length, BAR);
  context.clip();
  context.lineWidth = 1.6;
  context.beginPath();
  for (let offset = left - BAR; offset < left + length; offset += 4) {
    context.moveTo(offset, top + BAR);
    context.lineTo(offset + BAR, top);
  }
  context.stroke();
  context.restore();
}

/** A triangle over a service's lane; a line through all of them for what concerns no service alone. */
function mark(context, x, lane, height, ink) {
  context.fillStyle = ink;
  if (lane < 0) {
    context.fillRect(x, 0, 1.5, height - 24);
    return;
  }
  const y = lane * LANE + LANE - BAR - 5;
  context.beginPath();
  context.moveTo(x - 4, y - 6);
  context.lineTo(x + 4, y - 6);
  context.lineTo(x, y + 1);
  context.fill();
}

const describe = ({ services }) =>
  services.map(({ status: { name, state, swaps_in: swaps } }) => `${name} is ${state}, ${swaps} swaps`)
    .join("; ");

function drawEvents({ boot, happenings }) {
  const newest = `${boot} ${happenings.at(-1)?.number ?? 0}`;
  if (newest === shown) return; // whoever reads the list is not disturbed
  shown = newest;
  const items = happenings.slice(-60).reverse().map(({ time, kind, service, text }) => {
    const name = service ? [el("strong", {}, service), " "] : [];
    const item = el("li", { class: kind }, el("time", {}, clock(time)), el("span", {}, ...name, text));
    item.style.setProperty("--colour", serviceVariable(service));
    return item;
  });
  $("events").replaceChildren(...(items.length ? items : [el("li", { class: "quiet" }, "Nothing yet.")]));
}
