// One session: its events and commands over a WebSocket, its pictures and sound over WebRTC, or over a
// WebSocket too where WebRTC finds no way through. The server frees the session when one of these ends,
// so a connection that is lost is never resumed.

import * as api from "./api.js";
import { NoWayThrough, PeerMedia } from "./peer.js";
import { SocketMedia } from "./stream.js";

const OPEN_MS = 20_000; // for a socket

// Why the server closed the session; what is not here was the connection, which is tried again.
const ENDINGS = {
  closed: "The session was closed.",
  deleted: "The session was closed.",
  idle_timeout: "Nobody spoke for a while, so the session was closed.",
  total_timeout: "The session has reached its longest time.",
  failed: "The session failed; the server's log says why.",
};

/**
 * Events: `event` (detail: a message of the server), `closed` (detail: {message, again}, where
 * `again` says whether another try makes sense). `close` may be called at any time.
 */
export class Connection extends EventTarget {
  /**
   * Opens a session and connects it; rejects with one line for people. `onFallback()` is told when
   * WebRTC is given up; where `byWebRtc` is false it is not tried.
   */
  static async open(wanted, options) {
    const { iceServers, byWebRtc, signal, onQueue, onFallback } = options;
    const session = await api.openSession(wanted, { signal, onQueue });
    const connection = new Connection(session);
    try {
      await connection.#connect({ iceServers, byWebRtc, signal, onFallback });
    } catch (error) {
      connection.close();
      // For the server, WebRTC came through at the moment when it was given up here: the session is lost.
      if (byWebRtc && connection.#socketsOnly && error.status === 0) {
        return Connection.open(wanted, { ...options, byWebRtc: false });
      }
      throw error;
    }
    return connection;
  }

  #media = null;
  #socket = null; // that takes commands
  #sockets = [];
  #socketsOnly = false;
  #closed = false;

  constructor(session) {
    super();
    this.session = session;
  }

  /** Whether pictures and sound come over WebRTC. */
  get isWebRtc() {
    return this.#media instanceof PeerMedia;
  }

  async #connect({ iceServers, byWebRtc, signal, onFallback }) {
    let lose;
    const lost = new Promise((_, reject) => { lose = reject; });
    lost.catch(() => {}); // once connected, it is an event
    signal?.addEventListener("abort", () => lose(signal.reason), { once: true });
    this.addEventListener("closed", ({ detail }) => lose(new api.ApiError(0, detail.message)));
    if (byWebRtc && window.RTCPeerConnection) {
      try {
        return await Promise.race([this.#overWebRtc(iceServers, signal), lost]);
      } catch (error) {
        if (!(error instanceof NoWayThrough)) throw error;
        this.#media.close();
      }
    }
    this.#socketsOnly = true;
    onFallback();
    await Promise.race([this.#overSocket(), lost]);
  }

  async #overWebRtc(iceServers, signal) {
    const opened = this.#open("events");
    this.#media = new PeerMedia(this.session, iceServers, () => this.#end());
    await Promise.all([opened, this.#media.connect(signal)]);
  }

  /** A session that waits for WebRTC gives its pictures to the first socket that asks for them. */
  async #overSocket() {
    const opened = this.#open("jpeg");
    this.#media = new SocketMedia(this.session, this.#socket);
    await opened;
  }

  /** A stream of the session, which takes the commands from now on. */
  async #open(format) {
    const socket = api.streamSocket(this.session.id, format);
    this.#socket = socket;
    this.#sockets.push(socket);
    socket.addEventListener("message", ({ data }) => {
      if (socket === this.#socket) this.#receive(data);
    });
    socket.addEventListener("close", ({ reason }) => this.#end(ENDINGS[reason]));
    const opened = new Promise((resolve) => { socket.addEventListener("open", resolve); });
    await Promise.race([opened, api.pause(OPEN_MS)]);
    if (socket.readyState !== WebSocket.OPEN) throw new api.ApiError(0, "The server cannot be reached.");
  }

  #receive(data) {
    if (typeof data !== "string") return;
    const event = JSON.parse(data);
    this.#media.note(event);
    this.dispatchEvent(new CustomEvent("event", { detail: event }));
  }

  /** Without a message it was the connection that was lost. */
  #end(message) {
    if (this.#closed) return;
    this.#release();
    const detail = { message: message ?? "The connection was lost.", again: !message };
    this.dispatchEvent(new CustomEvent("closed", { detail }));
  }

  /** Shows it on a stage {video, canvas}; `onPicture(ms)` is told of each picture. */
  show(stage, onPicture) {
    this.#media.show(stage, onPicture);
  }

  /** The microphone that is heard from now on; null for none. */
  async useMicrophone(microphone) {
    await this.#media.useMicrophone(microphone);
  }

  /** Stops speaking. What the browser has buffered is not heard. */
  interrupt() {
    this.#media.hush();
    this.command({ type: "interrupt" });
  }

  /** A command of the protocol. */
  command(message) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  /** Sound: an Int16Array in the format that the last `audio` command said. */
  send(samples) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(samples);
  }

  /** Bytes that were sent and have not left yet. */
  get unsentBytes() {
    return this.#socket.bufferedAmount;
  }

  /** Milliseconds of a round trip to the server; null where it is not known. */
  roundTripMs() {
    return this.#media.roundTripMs();
  }

  close() {
    if (this.#closed) return;
    // The session ends with its socket; one that has none yet has to be told.
    const told = this.#socket?.readyState === WebSocket.OPEN;
    this.#release();
    if (!told) api.closeSession(this.session.id);
  }

  #release() {
    this.#closed = true;
    this.#media?.close();
    for (const socket of this.#sockets) socket.close(1000);
  }
}
