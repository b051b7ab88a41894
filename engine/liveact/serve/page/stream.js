// Pictures and sound over a WebSocket: each message is a JPEG and the sound that plays while it is shown
// (docs/protocol.md, "The header of a frame"). The microphone goes the other way as PCM.

import { Player } from "./player.js";

const HEADER_BYTES = 32;
const SPEECH = 1; // a flag

export class SocketMedia {
  #session;
  #socket;
  #player = null;
  #microphone = null;
  #pingedMs = null;
  #roundTripMs = null;

  constructor(session, socket) {
    this.#session = session;
    this.#socket = socket;
    socket.addEventListener("message", ({ data }) => {
      if (typeof data !== "string") this.#player?.put(frameOf(data));
    });
  }

  show({ video, canvas }, onPicture) {
    video.hidden = true;
    canvas.hidden = false;
    const { width, height } = this.#session;
    Object.assign(canvas, { width, height });
    this.#player = new Player(canvas, onPicture);
  }

  async useMicrophone(microphone) {
    const before = this.#microphone;
    this.#microphone = microphone;
    if (before) this.#command({ type: "end_of_utterance" });
    if (!microphone) return;
    this.#command({ type: "audio", sample_rate_hz: microphone.rateHz, channels: 1, gate: true });
    await microphone.listen((samples) => {
      if (this.#microphone === microphone && this.#isOpen) this.#socket.send(samples);
    });
  }

  hush() {
    this.#player?.hush();
  }

  /** An event of the session; it comes in order with the frames. */
  note({ type, id }) {
    if (type === "interrupted") this.#player?.forget();
    if (type === "pong" && id === 0) this.#roundTripMs = performance.now() - this.#pingedMs;
  }

  /** Of the question before. */
  async roundTripMs() {
    this.#pingedMs = performance.now();
    this.#command({ type: "ping", id: 0 });
    return this.#roundTripMs;
  }

  get #isOpen() {
    return this.#socket.readyState === WebSocket.OPEN;
  }

  #command(message) {
    if (this.#isOpen) this.#socket.send(JSON.stringify(message));
  }

  close() {
    this.#microphone = null;
    this.#player?.close();
  }
}

/** {jpeg: Blob, pcm: Int16Array, speech} of a message. */
function frameOf(message) {
  const header = new DataView(message, 0, HEADER_BYTES);
  const pictureBytes = header.getUint32(24, true);
  const pcmBytes = header.getUint32(28, true);
  const picture = new Uint8Array(message, HEADER_BYTES, pictureBytes);
  const sound = message.slice(HEADER_BYTES + pictureBytes); // Int16Array wants an even offset
  return {
    jpeg: new Blob([picture], { type: "image/jpeg" }),
    pcm: new Int16Array(sound, 0, pcmBytes / 2),
    speech: (header.getUint8(5) & SPEECH) !== 0,
  };
}
