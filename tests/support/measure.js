// What a visitor sees and hears for some seconds: grey pixels of a part of every picture, and the
// peak of every 128 samples of sound, each with the time of performance.now() at which it is
// presented. The part is in shares of the picture: [left, top, width, height].
async ({ part, seconds, side }) => {
  const video = document.getElementById("video");
  const canvas = new OffscreenCanvas(side, side);
  const paint = canvas.getContext("2d", { willReadFrequently: true });
  const pictures = [];
  const context = new AudioContext({ sampleRate: 48000 });
  await context.resume();
  const ear = await listenTo(context.createMediaStreamSource(video.srcObject));

  let running = true;
  const see = (_, { expectedDisplayTime }) => {
    if (!running) return;
    const [left, top, width, height] = part;
    const { videoWidth: w, videoHeight: h } = video;
    paint.drawImage(video, left * w, top * h, width * w, height * h, 0, 0, side, side);
    const { data } = paint.getImageData(0, 0, side, side);
    const grey = [];
    for (let i = 0; i < data.length; i += 4) grey.push((data[i] + data[i + 1] + data[i + 2]) / 3);
    pictures.push({ ms: expectedDisplayTime, grey });
    video.requestVideoFrameCallback(see);
  };
  video.requestVideoFrameCallback(see);

  const ends = performance.now() + seconds * 1000;
  while (performance.now() < ends) {
    ear.tick();
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  running = false;
  await context.close();
  return { pictures, sounds: ear.found() };
}
