// What the server tells, second by second, and the past that was gathered from it.

import { ask, complaint, documents } from "./stream.js";

const PAUSE_SECONDS = [1, 10];

export class Feed {
  /** frame(latest) is called for each event; trouble(text) when there is none to be had, "" when there is. */
  constructor(frame, trouble) {
    this.frame = frame;
    this.trouble = trouble;
    this.boot = "";
    this.samples = [];
    this.happenings = [];
    this.latest = null;
    this.abort = new AbortController();
    document.addEventListener("visibilitychange", () => (document.hidden ? this.pause() : this.run()));
    this.running = false;
  }

  /** Nobody looks: the server need not speak. */
  pause() {
    this.abort.abort();
  }

  /** Start again from where it was, with another key for example. */
  restart() {
    this.abort.abort();
    setTimeout(() => this.run(), 0);
  }

  async run() {
    if (this.running) return;
    this.running = true;
    let pause = PAUSE_SECONDS[0];
    while (!document.hidden) {
      this.abort = new AbortController();
      const { signal } = this.abort;
      try {
        const response = await ask(`/ui/feed?${this.position()}`, { signal });
        if (!response.ok) throw new Error(await complaint(response));
        for await (const frame of documents(response)) {
          pause = PAUSE_SECONDS[0];
          this.take(frame);
        }
        throw new Error("the connection was lost");
      } catch (error) {
        if (signal.aborted) break;
        this.trouble(error instanceof TypeError ? "the server does not answer" : error.message);
      }
      await new Promise((resolve) => setTimeout(resolve, pause * 1000));
      pause = Math.min(2 * pause, PAUSE_SECONDS[1]);
    }
    this.running = false;
  }

  position() {
    const last = (list) => String(list.at(-1)?.number ?? 0);
    const [sample, happening] = [last(this.samples), last(this.happenings)];
    return new URLSearchParams({ boot: this.boot, sample, happening });
  }

  take(frame) {
    if (frame.boot !== this.boot) [this.boot, this.samples, this.happenings] = [frame.boot, [], []];
    this.samples.push(...frame.samples);
    this.happenings.push(...frame.happenings);
    const since = (this.samples.at(-1)?.time ?? 0) - frame.window_seconds;
    this.samples = this.samples.filter((sample) => sample.time > since);
    this.happenings = this.happenings.slice(-200);
    this.latest = frame;
    this.trouble("");
    this.frame(frame);
  }
}
