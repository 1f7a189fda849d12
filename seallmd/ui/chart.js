// Charts over time on a canvas: lines, stacked areas, sparklines. Times are seconds since 1970.

import { paper } from "./dom.js";
import { amount, colour } from "./looks.js";

const GAP_SECONDS = 5; // between two samples: a longer one is a hole, not a slope

/** A small line without axes. values: null where there is nothing. */
export function sparkline(canvas, times, values, ink, span) {
  const { context, width, height } = paper(canvas);
  const top = Math.max(1e-9, ...values.map((value) => value ?? 0));
  const scale = scales(times, span, 0, width, height - 2, 2, top);
  area(context, times, values, values.map(() => 0), scale, ink, 0.14);
  line(context, times, values, scale, ink, 1.5);
}

/**
 * A chart with axes.
 * series: [{values, ink, dash, width}]; stacked ones lie on each other, filled. format: writes a value.
 */
export function chart(canvas, times, series, { span, stacked = false, format = amount, least = 1 }) {
  const { context, width, height } = paper(canvas);
  const [left, bottom] = [46, 18];
  const sums = times.map((_, index) => series.map((one) => one.values[index] ?? 0));
  const reach = sums.map((values) => (stacked ? values.reduce((a, b) => a + b, 0) : Math.max(0, ...values)));
  const ticks = nice(Math.max(least, ...reach));
  const scale = scales(times, span, left, width, height - bottom, 6, ticks.at(-1));
  axes(context, ticks, scale, { left, width, height, bottom, format, span });
  let below = times.map(() => 0);
  for (const one of series) {
    if (stacked) {
      const values = one.values.map((value, index) => (value ?? 0) + below[index]);
      area(context, times, values, below, scale, one.ink, one.alpha ?? 0.75);
      below = values;
    } else {
      line(context, times, one.values, scale, one.ink, one.width ?? 1.75, one.dash);
    }
  }
}

function scales(times, span, left, right, bottom, top, most) {
  const end = times.at(-1) ?? 0;
  return {
    x: (time) => right - ((end - time) / span) * (right - left),
    y: (value) => bottom - (value / most) * (bottom - top),
  };
}

/** Three to five round values from 0 to at least `most`. */
function nice(most) {
  const power = 10 ** Math.floor(Math.log10(most / 4));
  const step = [1, 2, 2.5, 5, 10].map((digit) => digit * power).find((size) => size * 4 >= most * 0.999);
  const count = Math.max(1, Math.ceil(most / step - 0.001));
  return Array.from({ length: count + 1 }, (_, index) => index * step);
}

function axes(context, ticks, scale, { left, width, height, bottom, format, span }) {
  context.font = "11px system-ui, sans-serif";
  context.lineWidth = 1;
  context.strokeStyle = colour("faint");
  context.fillStyle = colour("quiet");
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const tick of ticks) {
    const y = Math.round(scale.y(tick)) + 0.5;
    context.beginPath();
    context.moveTo(left, y);
    context.lineTo(width, y);
    context.stroke();
    context.fillText(format(tick), left - 8, Math.max(6, y));
  }
  timeAxis(context, left, width, height - bottom, span);
}

/** Minutes before now below a chart. */
export function timeAxis(context, left, right, y, span) {
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = colour("quiet");
  context.textBaseline = "top";
  for (let minute = 0; minute * 60 <= span; minute += 1) {
    context.textAlign = minute === 0 ? "right" : minute * 60 === span ? "left" : "center";
    const x = right - ((minute * 60) / span) * (right - left);
    context.fillText(minute === 0 ? "now" : `−${minute} min`, x, y + 5);
  }
}

function line(context, times, values, scale, ink, width, dash = []) {
  context.strokeStyle = ink;
  context.lineWidth = width;
  context.lineJoin = "round";
  context.setLineDash(dash);
  context.beginPath();
  for (const run of runs(times, values)) {
    run.forEach((index, place) => {
      const [x, y] = [scale.x(times[index]), scale.y(values[index])];
      if (place) context.lineTo(x, y);
      else context.moveTo(x, y);
    });
  }
  context.stroke();
  context.setLineDash([]);
}

function area(context, times, values, below, scale, ink, alpha) {
  context.fillStyle = ink;
  context.globalAlpha = alpha;
  for (const run of runs(times, values)) {
    context.beginPath();
    for (const index of run) context.lineTo(scale.x(times[index]), scale.y(values[index]));
    for (const index of run.reverse()) context.lineTo(scale.x(times[index]), scale.y(below[index]));
    context.fill();
  }
  context.globalAlpha = 1;
}

/** Indexes of values that follow each other without a hole. */
function runs(times, values) {
  const found = [];
  let run = [];
  values.forEach((value, index) => {
    const hole = run.length && times[index] - times[run.at(-1)] > GAP_SECONDS;
    if ((value === null || value === undefined || hole) && run.length) {
      found.push(run);
      run = [];
    }
    if (value !== null && value !== undefined) run.push(index);
  });
  if (run.length) found.push(run);
  return found;
}
