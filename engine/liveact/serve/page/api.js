// The server's HTTP interface. Addresses are relative to the page, so it works behind a prefix.

let token = "";

/** A request that was refused, or did not arrive (status 0). `message` is one line for people. */
export class ApiError extends Error {
  constructor(status, message, details = {}) {
    super(message);
    this.status = status;
    this.details = details;
  }
}

/** The access token that goes with every request from now on. */
export function useToken(value) {
  token = value;
}

async function request(method, path, body, options = {}) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: JSON.stringify(body), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => ({}));
  const error = found.error ?? {};
  const retryS = Number(response.headers.get("Retry-After"));
  const details = { ...error, retryS: retryS || 2 };
  throw new ApiError(response.status, error.message ?? `The server answered ${response.status}.`, details);
}

/** What the page may offer: prompts, the example, ICE servers. */
export async function pageOptions() {
  return (await request("GET", "v1/options")).json();
}

/** The portraits of the server: [{name, width, height, thumbnail}]. */
export async function portraits() {
  return (await request("GET", "v1/portraits")).json();
}

/** An address for <img> of something that needs the token. */
export async function pictureUrl(path) {
  const response = await request("GET", relative(path));
  return URL.createObjectURL(await response.blob());
}

/** The bytes of a file of the server. */
export async function bytes(path) {
  return (await request("GET", relative(path))).arrayBuffer();
}

function relative(path) {
  return path.replace(/^\//, "");
}

/** Opens a session. While all places are taken it waits in the queue; `onQueue(position)` is told. */
export async function openSession(wanted, { signal, onQueue }) {
  let ticket;
  for (;;) {
    try {
      const body = ticket ? { ...wanted, ticket } : wanted;
      return await (await request("POST", "v1/sessions", body, { signal })).json();
    } catch (error) {
      if (error.status !== 503 || !error.details.ticket) throw error;
      ticket = error.details.ticket;
      onQueue(error.details.position);
      await pause(error.details.retryS * 1000, signal);
    }
  }
}

/** The answer to a WebRTC offer. */
export async function answerTo(id, description, signal) {
  const offer = { sdp: description.sdp, type: description.type };
  return (await request("POST", `v1/sessions/${id}/offer`, offer, { signal })).json();
}

/** Closes a session; also while the page is being left. */
export function closeSession(id) {
  return request("DELETE", `v1/sessions/${id}`, undefined, { keepalive: true }).catch(() => {});
}

/** A stream of a session, of a format of the protocol; it takes commands and sound. */
export function streamSocket(id, format) {
  const url = new URL(`v1/sessions/${id}/stream?format=${format}`, document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url, token ? ["liveact.v1", `bearer.${token}`] : ["liveact.v1"]);
  socket.binaryType = "arraybuffer";
  return socket;
}

/** Resolves after so many milliseconds; rejects when the signal says so. */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, { once: true });
  });
}
