// The line of measurements: pictures per second, lag, round trip, how long answers took.

/** Counts pictures from `start` to `stop`. */
export class Meter {
  #write;
  #startedMs = 0;
  #firstMs = null; // from the click to the first picture
  #saidMs = null; // something was said, and not answered yet
  #answerMs = null; // from what was said last to the face that says it
  #times = []; // of the pictures of the last second

  constructor(write) {
    this.#write = write;
  }

  start() {
    this.#startedMs = performance.now();
    this.#firstMs = this.#saidMs = this.#answerMs = null;
    this.#times = [];
    this.#write("");
  }

  /** A picture is shown. */
  picture(nowMs) {
    this.#firstMs ??= nowMs - this.#startedMs;
    this.#times = [...this.#times.filter((t) => nowMs - t < 1000), nowMs];
  }

  /** Speech has begun to go in. */
  said() {
    this.#saidMs = performance.now();
  }

  /** The face has begun to say it. */
  answered() {
    if (this.#saidMs === null) return;
    this.#answerMs = performance.now() - this.#saidMs;
    this.#saidMs = null;
  }

  /** stats: the server's; way: how pictures come, where that is to be said. */
  show(stats, { roundTripMs, way }) {
    const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
    const now = performance.now();
    const parts = [`${this.#times.filter((t) => now - t < 1000).length} fps`];
    parts.push(`lag ${stats.lag_s.toFixed(1)} s`);
    if (roundTripMs !== null) parts.push(`network ${Math.round(roundTripMs)} ms`);
    if (this.#firstMs !== null) parts.push(`first picture ${seconds(this.#firstMs)}`);
    if (this.#answerMs !== null) parts.push(`speech to face ${seconds(this.#answerMs)}`);
    if (stats.underruns) parts.push(`${stats.underruns} stalls`);
    if (way) parts.push(way);
    this.#write(parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · "));
  }
}
