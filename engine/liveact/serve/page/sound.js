// What goes in: the microphone, as a track or as PCM, and files, which are sent as PCM.

const RATE_HZ = 48_000; // what comes out of the session is heard, so nothing is thrown away
const PIECE_S = 0.25;
const AHEAD_S = 10; // a file is sent so far ahead of its own pace
const MAX_FILE_BYTES = 200 * 2 ** 20;
const MAX_FILE_S = 1200;

/** The microphone; `level` is from 0 to 1. */
export class Microphone {
  #stream;
  #context;
  #analyser;
  #source;
  #capture = null;

  /** Asks the visitor; rejects with one line for people. */
  static async open() {
    if (!navigator.mediaDevices) {
      throw new Error("The microphone needs https or localhost; an audio file works here too.");
    }
    try {
      const audio = { echoCancellation: true, noiseSuppression: true, autoGainControl: true };
      return new Microphone(await navigator.mediaDevices.getUserMedia({ audio }));
    } catch (error) {
      throw new Error(error.name === "NotFoundError"
        ? "There is no microphone here."
        : "The microphone was not allowed; the browser's address bar has its setting.");
    }
  }

  constructor(stream) {
    this.#stream = stream;
    this.#context = new AudioContext();
    this.#analyser = new AnalyserNode(this.#context, { fftSize: 1024 });
    this.#source = this.#context.createMediaStreamSource(stream);
    this.#source.connect(this.#analyser);
  }

  get track() {
    return this.#stream.getAudioTracks()[0];
  }

  /** Of what `listen` hands over. */
  get rateHz() {
    return this.#context.sampleRate;
  }

  /** Hands what is heard from now on to `take`, an Int16Array of 20 ms at a time. */
  async listen(take) {
    await this.#context.audioWorklet.addModule(new URL("./capture.js", import.meta.url));
    if (!this.#capture) {
      this.#capture = new AudioWorkletNode(this.#context, "capture");
      // Its output is silence: it runs while it is connected.
      this.#source.connect(this.#capture).connect(this.#context.destination);
    }
    this.#capture.port.onmessage = ({ data }) => take(data);
  }

  get level() {
    const samples = new Float32Array(this.#analyser.fftSize);
    this.#analyser.getFloatTimeDomainData(samples);
    const power = samples.reduce((sum, x) => sum + x * x, 0) / samples.length;
    return Math.min(1, Math.max(0, (10 * Math.log10(power + 1e-9) + 60) / 50));
  }

  close() {
    for (const track of this.#stream.getTracks()) track.stop();
    this.#context.close();
  }
}

/** An encoded sound, whatever the browser reads: mono Int16Array at RATE_HZ. */
export async function decode(encoded) {
  if (encoded.byteLength > MAX_FILE_BYTES) throw new Error("The file is too large: at most 200 MB.");
  const context = new OfflineAudioContext(1, 1, RATE_HZ); // decoding resamples to its rate
  let sound;
  try {
    sound = await context.decodeAudioData(encoded);
  } catch {
    throw new Error("The browser cannot read this file as sound.");
  }
  if (sound.duration > MAX_FILE_S) throw new Error("The file is too long: at most 20 minutes.");
  const mono = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    const samples = sound.getChannelData(channel);
    for (let i = 0; i < mono.length; i++) mono[i] += samples[i] / sound.numberOfChannels;
  }
  return Int16Array.from(mono, (x) => Math.max(-32768, Math.min(32767, Math.round(x * 32768))));
}

/**
 * Says a sound: sends it piece by piece, a bounded time ahead of its pace and of what the session
 * has used. `backlogS()` is what waits in the session. Resolves when all is sent; the signal ends
 * it early.
 */
export async function say(connection, samples, { signal, backlogS }) {
  const started = performance.now();
  const piece = RATE_HZ * PIECE_S;
  connection.command({ type: "audio", sample_rate_hz: RATE_HZ, channels: 1 });
  for (let i = 0; i < samples.length; i += piece) {
    const aheadS = () => i / RATE_HZ - (performance.now() - started) / 1000;
    while (aheadS() > AHEAD_S || backlogS() > AHEAD_S || connection.unsentBytes > 2 ** 20) {
      await new Promise((resolve) => setTimeout(resolve, 100));
      if (signal.aborted) return;
    }
    if (signal.aborted) return;
    connection.send(samples.slice(i, i + piece));
  }
  connection.command({ type: "end_of_utterance" });
}
