// When a page that plays over a WebSocket shows white and when a loud sound leaves it, for some seconds:
// the mean grey of every picture that is drawn and the peak of every 128 samples, each with its time of
// performance.now().
async (seconds) => {
  const canvas = document.getElementById("canvas");
  const paint = new OffscreenCanvas(4, 4).getContext("2d", { willReadFrequently: true });
  const output = window.outputs.findLast((node) => node instanceof GainNode);
  const ear = await listenTo(output);
  const pictures = [];

  const ends = performance.now() + seconds * 1000;
  while (performance.now() < ends) {
    const ms = await new Promise((resolve) => requestAnimationFrame(resolve));
    paint.drawImage(canvas, 0, 0, 4, 4);
    const { data } = paint.getImageData(0, 0, 4, 4);
    pictures.push([ms, data[0]]);
    ear.tick();
  }
  return { pictures, sounds: ear.found() };
}
