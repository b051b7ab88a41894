// Listens to a node of WebAudio: the peak of every 128 samples, with the time of performance.now() at
// which it is heard. `tick` is to be called now and then, so that the two clocks can be compared.
async function listenTo(node) {
  const { context } = node;
  const worklet = `registerProcessor("peaks", class extends AudioWorkletProcessor {
    process([input]) {
      const peak = input[0] ? input[0].reduce((most, x) => Math.max(most, Math.abs(x)), 0) : 0;
      this.port.postMessage([currentTime * 1000, peak]);
      return true;
    }
  })`;
  const module = new Blob([worklet], { type: "text/javascript" });
  await context.audioWorklet.addModule(URL.createObjectURL(module));
  const peaks = new AudioWorkletNode(context, "peaks");
  const sounds = [];
  const clocks = []; // performance.now() less the time of the sound, in ms
  peaks.port.onmessage = ({ data }) => sounds.push(data);
  node.connect(peaks).connect(context.destination);
  return {
    tick() {
      const { contextTime, performanceTime } = context.getOutputTimestamp();
      if (contextTime) clocks.push(performanceTime - contextTime * 1000);
    },
    /** [ms, peak] of all. */
    found() {
      clocks.sort((a, b) => a - b);
      const clock = clocks[Math.floor(clocks.length / 2)];
      return sounds.map(([ms, peak]) => [ms + clock, peak]);
    },
  };
}
