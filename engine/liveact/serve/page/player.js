// Plays frames that come one by one: their sound without a gap on the clock of the browser's sound, and
// each picture at the moment when its sound is heard.

const RATE_HZ = 48_000; // of the sound of all sessions
const BUFFER_S = 0.12; // between the arrival of the first frame and its sound; twice as much after a gap
const MAX_BUFFER_S = 0.5;
const SPARE_S = 0.1; // that may wait beyond the buffer
const MAX_WAITING_S = 1; // of speech; more was held up on the way and is too late
const RAMP_S = 0.005; // so that nothing clicks
const MAX_PICTURES = 40; // that wait to be shown; more are for a page that nobody looks at

let context = null; // which all players share
let players = 0;

/** To be called while the visitor clicks: browsers let nothing be heard without. */
export function allowSound() {
  context ??= new AudioContext({ sampleRate: RATE_HZ, latencyHint: "interactive" });
  context.resume().then(rest).catch(() => {});
}

function rest() {
  if (players === 0) context.suspend();
}

export class Player {
  #volume;
  #canvas;
  #paint;
  #onPicture;
  #nextSample = null; // of the context's clock: where the next frame begins
  #bufferS = BUFFER_S;
  #waiting = new Set(); // sources that play or will
  #pictures = []; // {atS, bitmap}, the first one first; the bitmap is null until it is decoded
  #closed = false;

  constructor(canvas, onPicture) {
    players++;
    allowSound();
    this.#canvas = canvas;
    this.#paint = canvas.getContext("2d");
    this.#onPicture = onPicture;
    this.#volume = new GainNode(context);
    this.#volume.connect(context.destination);
    requestAnimationFrame((nowMs) => this.#draw(nowMs));
  }

  /** {jpeg: Blob, pcm: Int16Array, speech}: the frame that follows the one before. */
  put({ jpeg, pcm, speech }) {
    const { currentTime } = context;
    const waitsS = this.#nextSample === null ? -1 : this.#nextSample / RATE_HZ - currentTime;
    if (waitsS < 0) {
      if (this.#nextSample !== null) this.#bufferS = Math.min(MAX_BUFFER_S, 2 * this.#bufferS);
      this.#nextSample = Math.ceil((currentTime + this.#bufferS) * RATE_HZ);
    } else if (waitsS > (speech ? MAX_WAITING_S : this.#bufferS + SPARE_S)) {
      return; // what a network has held up is caught up with where nobody speaks
    }
    const atS = this.#nextSample / RATE_HZ;
    this.#nextSample += pcm.length;
    this.#play(pcm, atS);
    this.#keep(jpeg, atS);
  }

  #play(pcm, atS) {
    const buffer = context.createBuffer(1, pcm.length, RATE_HZ);
    buffer.copyToChannel(Float32Array.from(pcm, (sample) => sample / 32768), 0);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(this.#volume);
    source.addEventListener("ended", () => this.#waiting.delete(source));
    this.#waiting.add(source);
    source.start(atS);
  }

  async #keep(jpeg, atS) {
    const picture = { atS, bitmap: null };
    this.#pictures.push(picture);
    if (this.#pictures.length > MAX_PICTURES) this.#pictures.shift().bitmap?.close();
    const bitmap = await createImageBitmap(jpeg).catch(() => null);
    if (this.#pictures.includes(picture)) picture.bitmap = bitmap;
    else bitmap?.close();
  }

  /** Shows the last picture whose sound has begun to be heard. */
  #draw(nowMs) {
    if (this.#closed) return;
    const heardS = timeHeardS(nowMs);
    const last = this.#pictures.findLastIndex(({ atS, bitmap }) => bitmap && atS <= heardS);
    const due = this.#pictures.splice(0, last + 1);
    if (due.length) {
      this.#paint.drawImage(due.at(-1).bitmap, 0, 0, this.#canvas.width, this.#canvas.height);
      this.#onPicture(nowMs);
    }
    for (const { bitmap } of due) bitmap?.close();
    requestAnimationFrame((ms) => this.#draw(ms));
  }

  /** Silence until `forget`. */
  hush() {
    this.#volume.gain.setTargetAtTime(0, context.currentTime, RAMP_S);
  }

  /** What was put so far is not heard; what comes is. */
  forget() {
    for (const source of this.#waiting) source.stop();
    this.#waiting.clear();
    this.#volume.gain.cancelScheduledValues(0);
    this.#volume.gain.value = 1;
  }

  close() {
    this.#closed = true;
    this.forget();
    this.#volume.disconnect();
    for (const { bitmap } of this.#pictures) bitmap?.close();
    this.#pictures = [];
    players--;
    rest();
  }
}

/** The time of the context's clock that leaves the loudspeaker at a time of performance.now(). */
function timeHeardS(nowMs) {
  const { contextTime, performanceTime } = context.getOutputTimestamp();
  if (!contextTime) return context.currentTime - (context.outputLatency || 0);
  return contextTime + (nowMs - performanceTime) / 1000;
}
