// An AudioWorklet: hands over what it hears as 16-bit PCM, in pieces of 20 ms.

registerProcessor("capture", class extends AudioWorkletProcessor {
  #piece = new Int16Array(Math.round(sampleRate / 50));
  #length = 0;

  process([[samples]]) {
    for (const sample of samples ?? []) {
      this.#piece[this.#length++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.#length < this.#piece.length) continue;
      this.port.postMessage(this.#piece.slice());
      this.#length = 0;
    }
    return true;
  }
});
