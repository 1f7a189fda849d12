// The page: what the feed brings goes to its parts.

import { deviceTrouble, drawDevices } from "./arena.js";
import { chart, sparkline } from "./chart.js";
import { offerModels, startChat } from "./chat.js";
import { $, el, say } from "./dom.js";
import { Feed } from "./feed.js";
import { amount, colour, onLooks, plural, seconds, serviceColour, setServices } from "./looks.js";
import { drawServices } from "./services.js";
import { setKey } from "./stream.js";
import { drawTimeline } from "./timeline.js";

const sum = (sample, field) =>
  Object.values(sample.services).reduce((total, service) => total + service[field], 0);
const [RUNNING, WAITING, RATE] = [1, 2, 3]; // fields of a service in a sample

// name, unit, the figure of a sample, how it is written
const TILES = [
  ["Output", "tokens/s", (sample) => sum(sample, RATE), amount],
  ["Running", "requests", (sample) => sum(sample, RUNNING), amount],
  ["Waiting", "requests", (sample) => sum(sample, WAITING), amount],
  ["First token", "P95", (sample) => sample.first_token?.[1] ?? null, seconds],
  ["Each next token", "P95", (sample) => sample.next_token?.[1] ?? null, seconds],
];

const tiles = TILES.map(([name, unit]) => {
  const [figure, canvas] = [el("span"), el("canvas", { "aria-hidden": "true" })];
  const value = el("p", { class: "figure" }, figure, " ", el("small", {}, unit));
  $("tiles").append(el("li", { class: "tile" }, el("p", { class: "name" }, name), value, canvas));
  return { figure, canvas };
});

const feed = new Feed(draw, showTrouble);

function draw() {
  const { latest } = feed;
  if (!latest) return;
  const names = latest.services.map((card) => card.status.name);
  setServices(names);
  showHealth(latest);
  drawTiles();
  drawDevices(latest);
  drawServices(feed, showNotice);
  drawCharts(names);
  drawTimeline(feed);
  offerModels(names);
}

function drawTiles() {
  const times = feed.samples.map((sample) => sample.time);
  TILES.forEach(([, , read, write], index) => {
    const values = feed.samples.map(read);
    say(tiles[index].figure, write(values.at(-1) ?? null));
    sparkline(tiles[index].canvas, times, values, colour("accent"), feed.latest.window_seconds);
  });
}

function drawCharts(names) {
  const { samples } = feed;
  const times = samples.map((sample) => sample.time);
  const span = feed.latest.window_seconds;
  const of = (field) => (name) => samples.map((sample) => sample.services[name]?.[field] ?? 0);
  const stack = (field, alpha) =>
    names.map((name) => ({ values: of(field)(name), ink: serviceColour(name), alpha }));
  const requests = [...stack(RUNNING, 0.85), ...stack(WAITING, 0.35)];
  chart($("chart-requests"), times, requests, { span, stacked: true, least: 4 });
  chart($("chart-tokens"), times, stack(RATE, 0.8), { span, stacked: true, least: 10 });
  for (const [id, field] of [["chart-first", "first_token"], ["chart-next", "next_token"]]) {
    const series = ["P50", "P95", "P99"].map((name, index) => ({
      name,
      values: samples.map((sample) => sample[field]?.[index] ?? null),
      ink: colour(["s0", "s1", "s2"][index]),
      dash: [[], [6, 3], [2, 3]][index],
    }));
    chart($(id), times, series, { span, format: seconds, least: 0.01 });
    const now = series.map((one) => `${one.name} ${seconds(one.values.at(-1))}`).join(", ");
    say($(id).parentElement.querySelector(".percentiles"), `${now} (— ╌ ·)`);
    $(id).setAttribute("aria-label", `The last five minutes; now ${now}`);
  }
  const label = (id, text) => $(id).setAttribute("aria-label", `Five minutes, by service; now ${text}`);
  const [now] = samples.slice(-1);
  if (now) label("chart-requests", `${sum(now, RUNNING)} running, ${sum(now, WAITING)} waiting`);
  if (now) label("chart-tokens", `${amount(sum(now, RATE))} tokens per second`);
}

function showHealth(latest) {
  const trouble = latest.draining ? "stopping" : deviceTrouble(latest);
  const resident = latest.services.filter((card) => card.status.state === "resident").length;
  setHealth(trouble || `up · ${resident} of ${latest.services.length} resident`, trouble ? "warn" : "good");
  say($("about"), `${latest.version} · ${latest.policy} · ${plural(latest.devices.length, "device")}`);
}

function showTrouble(text) {
  if (text) setHealth(text, "bad");
}

function setHealth(text, mood) {
  say($("health"), text);
  $("health").className = `pill ${mood}`;
}

function showNotice(text) {
  $("notice").hidden = !text;
  say($("notice"), text);
}

$("key").addEventListener("change", (event) => {
  setKey(event.target.value);
  feed.restart();
});
onLooks(draw);
startChat();
feed.run();
