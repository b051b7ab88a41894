// Pictures and sound over WebRTC, and the microphone with them.

import * as api from "./api.js";

const REACH_MS = 8_000; // from the answer; where nothing came through by then, nothing will
const CONNECT_MS = 12_000; // from the answer too, for the exchange of keys; the server gives up after 15 s
const GATHER_MS = 2_000; // a candidate that takes longer is not waited for
// Both buffers begin with what sound needs anyway. Left to itself a browser shows pictures at once and
// brings the two together within some 10 s.
const BUFFER_MS = 100;
const STALE_MS = 1000; // that a jitter buffer may hold of what was interrupted

/** There is no connection: no UDP, as in many company networks. */
export class NoWayThrough extends Error {}

export class PeerMedia {
  #session;
  #peer;
  #sender;
  #stream = null;
  #isConnected = false;
  #closed = false;

  /** `onLost()` is told where it was connected and is no more. */
  constructor(session, iceServers, onLost) {
    this.#session = session;
    this.#peer = new RTCPeerConnection({ iceServers });
    this.#peer.addEventListener("connectionstatechange", () => {
      if (this.#isConnected && this.#peer.connectionState === "failed") onLost();
    });
  }

  /** Rejects with NoWayThrough after a bounded time. */
  async connect(signal) {
    const peer = this.#peer;
    peer.addTransceiver("video", { direction: "recvonly" });
    // The microphone comes later, or never; its place is negotiated now.
    this.#sender = peer.addTransceiver("audio", { direction: "sendrecv" }).sender;
    peer.addEventListener("track", ({ streams, receiver }) => {
      this.#stream = streams[0];
      receiver.jitterBufferTarget = BUFFER_MS;
    });
    await peer.setLocalDescription();
    const gathered = until(peer, "icegatheringstatechange", () => peer.iceGatheringState === "complete");
    await Promise.race([gathered, api.pause(GATHER_MS, signal)]);
    await peer.setRemoteDescription(await api.answerTo(this.#session.id, peer.localDescription, signal));
    const reached = () => ["connected", "completed"].includes(peer.iceConnectionState);
    const failed = () => ["failed", "closed"].includes(peer.connectionState);
    const connected = () => peer.connectionState === "connected";
    const late = api.pause(CONNECT_MS, signal);
    late.catch(() => {});
    const hears = until(peer, "iceconnectionstatechange", () => reached() || failed());
    await Promise.race([hears, api.pause(REACH_MS, signal)]);
    if (!reached()) throw new NoWayThrough();
    const settles = until(peer, "connectionstatechange", () => connected() || failed());
    await Promise.race([settles, late]);
    if (!connected()) throw new NoWayThrough();
    this.#isConnected = true;
  }

  show({ video, canvas }, onPicture) {
    video.hidden = false;
    canvas.hidden = true;
    video.srcObject = this.#stream;
    video.play().catch(() => {});
    const count = (nowMs) => {
      if (this.#closed) return;
      onPicture(nowMs);
      video.requestVideoFrameCallback(count);
    };
    video.requestVideoFrameCallback(count);
  }

  async useMicrophone(microphone) {
    await this.#sender.replaceTrack(microphone?.track ?? null);
  }

  hush() {
    this.#beAudible(false);
  }

  /** An event of the session. */
  note({ type }) {
    if (type === "utterance_started") this.#beAudible(true);
    if (type === "interrupted") setTimeout(() => this.#beAudible(true), STALE_MS);
  }

  #beAudible(value) {
    for (const track of this.#stream?.getAudioTracks() ?? []) track.enabled = value;
  }

  async roundTripMs() {
    for (const report of (await this.#peer.getStats()).values()) {
      if (report.type === "candidate-pair" && report.nominated && report.currentRoundTripTime !== undefined) {
        return report.currentRoundTripTime * 1000;
      }
    }
    return null;
  }

  close() {
    this.#closed = true;
    this.#peer.close();
  }
}

/** Resolves when the condition holds, which is looked at now and at every event. */
function until(target, event, condition) {
  return new Promise((resolve) => {
    const look = () => {
      if (!condition()) return;
      target.removeEventListener(event, look);
      resolve();
    };
    target.addEventListener(event, look);
    look();
  });
}
