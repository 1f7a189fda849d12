// The table of services, with the buttons of what may be done to them.

import { sparkline } from "./chart.js";
import { $, el, keyed, say } from "./dom.js";
import { amount, bytes, seconds, serviceColour, serviceVariable } from "./looks.js";
import { ask, complaint } from "./stream.js";

// Verbs that the page can draw: the word on the button, and when it makes sense. The server says which exist.
const GONE = ["absent", "probing", "refused"];
const VERBS = {
  load: { word: "Load", fits: (status) => status.state === "absent" },
  evict: { word: "Evict", fits: (status) => !GONE.includes(status.state) && !status.pinned },
  pin: { word: "Pin", fits: (status) => !status.pinned && status.state !== "refused" },
  unpin: { word: "Unpin", fits: (status) => status.pinned },
  drain: { word: "Drain", fits: (status) => !status.drained && !GONE.includes(status.state) },
  undrain: { word: "Undrain", fits: (status) => status.drained },
};
const LOADING = ["reading", "copying", "probing"];
const STATES = { reading: "being read", copying: "coming in", probing: "being examined", absent: "away",
  resident: "resident", draining: "leaving", refused: "refused" };

const views = new Map();

export function drawServices(feed, notice) {
  const { services, verbs, denied, targets, window_seconds: span } = feed.latest;
  const byName = new Map(services.map((card) => [card.status.name, card]));
  keyed($("service-list"), views, [...byName.keys()], (name) => new ServiceRow(name, notice));
  for (const [name, view] of views) view.show(byName.get(name), verbs, feed.samples, span);
  const [first, next] = [seconds(targets.first_token_seconds), seconds(targets.next_token_seconds)];
  const limits = `first token in ${first}, each next in ${next} on average`;
  say($("targets"), `Targets: ${limits}. P50 and P95 of five minutes.`);
  $("denied").hidden = !denied;
  say($("denied"), denied);
}

class ServiceRow {
  constructor(name, notice) {
    [this.name, this.notice, this.busy] = [name, notice, ""];
    const swatch = el("span", { class: "swatch" });
    swatch.style.setProperty("--colour", serviceVariable(name));
    this.model = el("small");
    this.state = el("span");
    this.progress = el("progress", { max: 1, "aria-label": `how far ${name} is` });
    this.where = el("small");
    this.reason = el("small", { class: "reason" });
    this.requests = el("span");
    this.waiting = el("small");
    this.rate = el("span");
    this.line = el("canvas", { "aria-hidden": "true" });
    [this.first, this.firstTail] = [el("span"), el("small")];
    [this.next, this.nextTail] = [el("span"), el("small")];
    this.met = el("span");
    this.meter = el("meter", { min: 0, max: 1, low: 0.9, high: 0.99, optimum: 1, "aria-hidden": "true" });
    this.buttons = new Map();
    this.verbs = el("div", { class: "verbs" });
    const who = el("div", { class: "who" }, swatch, el("div", {}, el("strong", {}, name), this.model));
    const cell = (title, ...parts) => el("td", { "data-name": title }, ...parts);
    this.node = el(
      "tr", {}, el("td", {}, who),
      cell("State", this.state, this.progress, this.where, this.reason),
      cell("Requests", this.requests, this.waiting),
      cell("Tokens/s", el("div", { class: "rate" }, this.rate, this.line)),
      cell("First token", this.first, this.firstTail), cell("Each next", this.next, this.nextTail),
      cell("Targets met", this.met, this.meter), el("td", {}, this.verbs),
    );
  }

  show({ status, figures }, verbs, samples, span) {
    const model = status.model.split("/").pop(); // where it lies is nobody's business here
    const held = [status.pinned && "pinned", status.drained && "drained"].filter(Boolean);
    say(this.model, [model, status.dtype, ...held].join(" · "));
    const loading = LOADING.includes(status.state);
    this.state.className = `state ${loading ? "loading" : status.state}`;
    say(this.state, STATES[status.state] ?? status.state);
    this.progress.hidden = status.stage === null;
    if (status.stage !== null) this.progress.value = status.stage;
    const places = status.groups.map((group) => group.join("+")).join(", ");
    const size = status.weights_bytes ? bytes(status.weights_bytes) : "";
    say(this.where, places ? `device ${places} · ${size}` : size);
    say(this.reason, status.reason);
    say(this.requests, `${status.running} running`);
    say(this.waiting, `${status.waiting} waiting`);
    say(this.rate, amount(status.tokens_per_second));
    const values = samples.map((sample) => sample.services[status.name]?.[3] ?? null);
    sparkline(this.line, samples.map((sample) => sample.time), values, serviceColour(status.name), span);
    this.showFigures(figures);
    this.showVerbs(status, verbs);
  }

  showFigures(figures) {
    const pair = (head, tail, values) => {
      say(head, seconds(values?.[0]));
      say(tail, values ? `P95 ${seconds(values[1])}` : "");
    };
    pair(this.first, this.firstTail, figures?.first_token);
    pair(this.next, this.nextTail, figures?.next_token);
    const asked = figures ? figures.ended + figures.failed : 0;
    this.meter.hidden = !asked;
    if (asked) this.meter.value = figures.met / asked;
    const share = Math.floor((100 * (figures?.met ?? 0)) / asked); // 100% is said of all alone
    say(this.met, asked ? `${share}% of ${asked}` : "–");
  }

  /** Buttons stay where they are while they exist, so that the focus does. */
  showVerbs(status, verbs) {
    const possible = verbs.filter((verb) => VERBS[verb]?.fits(status) || verb === this.busy);
    keyed(this.verbs, this.buttons, possible, (verb) => {
      const click = () => this.operate(verb);
      return { node: el("button", { type: "button", click, "aria-label": `${VERBS[verb].word} ${this.name}` },
        VERBS[verb].word) };
    });
    for (const [, { node }] of this.buttons) node.disabled = this.busy !== "";
  }

  async operate(verb) {
    this.busy = verb;
    for (const [, { node }] of this.buttons) node.disabled = true;
    try {
      const headers = { "X-Seallmd-Page": "1" };
      const path = `/ui/services/${encodeURIComponent(this.name)}/${verb}`;
      const response = await ask(path, { method: "POST", headers });
      this.notice(response.ok ? "" : await complaint(response));
    } catch {
      this.notice("the server does not answer");
    }
    this.busy = "";
  }
}
