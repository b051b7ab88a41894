// The page: what is clicked becomes calls, what happens becomes what is shown.

import * as api from "./api.js";
import { Connection } from "./connection.js";
import { Meter } from "./meter.js";
import { allowSound } from "./player.js";
import { Microphone, decode, say } from "./sound.js";

const RETRY_MS = [500, 1000, 2000, 4000, 8000]; // after a connection that was lost
const PORTRAIT_PIXELS = 1024; // the longer side of an upload; more is only slower

const LOUD = 0.4; // level of a microphone that hears speech
const PAUSE_MS = 1000; // after which it is something new

const $ = (id) => document.getElementById(id);

let options = { prompts: {}, prompt: "", ice_servers: [] };
let portrait = null; // a name, or {data} of an upload
let connection = null;
let microphone = null;
let opening = null; // AbortController of a connection that is being made
let saying = null; // AbortController of a file that is being sent
let backlogS = 0;
let byWebRtc = true; // until it found no way through, and again when the visitor starts anew
const meter = new Meter((line) => { $("meter").textContent = line; });

// ---------------------------------------------------------------------------- what is shown

function show(state, line = "") {
  document.body.dataset.state = state;
  $("state").textContent = line;
  if (state !== "live") $("video").parentElement.classList.remove("shows");
}

function fail(error) {
  const line = error?.message ?? "";
  $("error").textContent = line;
  $("error").hidden = !line;
}

/** Runs what a click asks for, and shows the error that it ends with. */
function onClick(id, act, event = "click") {
  $(id).addEventListener(event, async (e) => {
    e.preventDefault();
    fail(null);
    try {
      await act(e);
    } catch (error) {
      fail(error);
    }
  });
}

function showPoster(url) {
  $("poster").src = url;
  $("poster").hidden = false;
}

function addPortrait(value, url, label) {
  const tile = document.createElement("label");
  const radio = document.createElement("input");
  const picture = document.createElement("img");
  tile.className = "tile";
  tile.title = label;
  Object.assign(radio, { type: "radio", name: "portrait", className: "hidden" });
  Object.assign(picture, { src: url, alt: label });
  tile.append(radio, picture);
  $("gallery").prepend(tile);
  const choose = () => {
    portrait = value;
    showPoster(url);
  };
  radio.addEventListener("change", choose);
  return () => {
    radio.checked = true;
    choose();
  };
}

function showPrompts() {
  const chips = Object.entries(options.prompts).map(([name, text]) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = name;
    chip.dataset.prompt = text;
    chip.addEventListener("click", () => usePrompt(text));
    return chip;
  });
  $("prompts").replaceChildren(...chips);
  markPrompt();
}

function markPrompt() {
  for (const chip of $("prompts").children) {
    chip.setAttribute("aria-pressed", String(chip.dataset.prompt === $("prompt").value));
  }
}

function usePrompt(text) {
  $("prompt").value = text;
  markPrompt();
  connection?.command({ type: "prompt", prompt: text || options.prompt });
}

// ---------------------------------------------------------------------------- the connection

async function start() {
  if (portrait === null) throw new Error("Choose a portrait first.");
  byWebRtc = true;
  allowSound();
  await connect();
}

/** Connects, once more after each failure for which `again` is given. */
async function connect() {
  opening = new AbortController();
  const { signal } = opening;
  show("busy", "Connecting…");
  meter.start();
  const wanted = { portrait, prompt: $("prompt").value || options.prompt };
  const iceServers = options.ice_servers.map((urls) => ({ urls }));
  const onFallback = () => {
    byWebRtc = false;
    show("busy", "WebRTC finds no way through: connecting over a WebSocket…");
  };
  const onQueue = (position) => show("busy", `All places are taken. You are number ${position} in the queue.`);
  try {
    connection = await Connection.open(wanted, { iceServers, byWebRtc, signal, onQueue, onFallback });
  } catch (error) {
    show("idle");
    if (signal.aborted) return;
    if (error.status === 401) $("access").hidden = false;
    throw error;
  } finally {
    opening = null;
  }
  const current = connection;
  current.addEventListener("event", ({ detail }) => onEvent(detail, current));
  current.addEventListener("closed", ({ detail }) => onClosed(detail));
  const { width, height } = current.session;
  $("video").parentElement.style.setProperty("--ratio", String(width / height));
  show("live", `Waiting for the first picture${current.isWebRtc ? "" : " over a WebSocket"}…`);
  let shows = false;
  current.show({ video: $("video"), canvas: $("canvas") }, (nowMs) => {
    if (connection !== current) return;
    meter.picture(nowMs);
    if (shows) return;
    shows = true;
    $("video").parentElement.classList.add("shows");
    show("live");
  });
  if (microphone) await current.useMicrophone(microphone);
}

function onEvent(event, current) {
  if (event.type === "stats") {
    backlogS = event.backlog_s;
    const way = current.isWebRtc ? "" : "over WebSocket";
    current.roundTripMs().then((roundTripMs) => meter.show(event, { roundTripMs, way }));
  } else if (event.type === "utterance_started") {
    meter.answered();
  } else if (event.type === "error") {
    fail({ message: event.message });
  }
}

async function onClosed({ message, again }) {
  stopSaying();
  connection = null;
  $("video").srcObject = null;
  if (!again) {
    stopTalking();
    show("idle");
    fail({ message });
    return;
  }
  for (const [i, ms] of RETRY_MS.entries()) {
    show("busy", `${message} Connecting again (${i + 1} of ${RETRY_MS.length})…`);
    opening = new AbortController();
    try {
      await api.pause(ms, opening.signal);
      await connect();
      return;
    } catch (error) {
      if (error.name === "AbortError") {
        show("idle");
        return;
      }
      message = error.message;
      if (error.status >= 400 && error.status < 500) break;
    }
  }
  stopTalking();
  show("idle");
  fail({ message });
}

function end() {
  opening?.abort();
  stopSaying();
  stopTalking();
  connection?.close();
  connection = null;
  $("video").srcObject = null;
  show("idle");
}

// ---------------------------------------------------------------------------- what is said

async function talk() {
  if (microphone) {
    stopTalking();
    return;
  }
  stopSaying();
  microphone = await Microphone.open();
  await connection?.useMicrophone(microphone);
  $("talk").setAttribute("aria-pressed", "true");
  $("talk-text").textContent = "Listening";
  const listening = microphone;
  let loudMs = 0; // when it was loud last
  const draw = (nowMs) => {
    if (microphone !== listening) return;
    const { level } = listening;
    $("talk").style.setProperty("--level", level.toFixed(2));
    if (level > LOUD) {
      if (nowMs - loudMs > PAUSE_MS) meter.said();
      loudMs = nowMs;
    }
    requestAnimationFrame(draw);
  };
  requestAnimationFrame(draw);
}

function stopTalking() {
  if (!microphone) return;
  microphone.close();
  microphone = null;
  connection?.useMicrophone(null);
  $("talk").setAttribute("aria-pressed", "false");
  $("talk-text").textContent = "Talk";
}

/** Says an encoded sound: the microphone is off meanwhile, or both would be one utterance. */
async function sayFile(encoded) {
  stopTalking();
  stopSaying();
  saying = new AbortController();
  const { signal } = saying;
  const samples = await decode(await encoded);
  if (signal.aborted || !connection) return;
  backlogS = 0;
  meter.said();
  await say(connection, samples, { signal, backlogS: () => backlogS });
}

function stopSaying() {
  saying?.abort();
  saying = null;
}

/** Silence at once: what the browser has buffered already is not heard. */
function interrupt() {
  stopSaying();
  connection?.interrupt();
}

// ---------------------------------------------------------------------------- portraits

/** {data}: base64 of a JPEG of what the visitor chose, no larger than is useful. */
async function upload(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error("The browser cannot read this file as a picture.");
  });
  const scale = Math.min(1, PORTRAIT_PIXELS / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const url = canvas.toDataURL("image/jpeg", 0.92);
  addPortrait({ data: url.slice(url.indexOf(",") + 1) }, url, file.name)();
}

async function load() {
  options = await api.pageOptions();
  $("prompt").value ||= options.prompt;
  $("prompt").placeholder = options.prompt;
  $("example").hidden = !options.example;
  showPrompts();
  const found = await api.portraits();
  for (const { name, thumbnail } of found.reverse()) {
    const choose = addPortrait(name, await api.pictureUrl(thumbnail), name);
    if (name === found.at(-1).name) choose();
  }
}

async function unlock() {
  api.useToken($("token").value);
  await load();
  $("access").hidden = true;
}

// ---------------------------------------------------------------------------- what is clicked

onClick("start", start);
onClick("cancel", end);
onClick("end", end);
onClick("talk", talk);
onClick("interrupt", interrupt);
onClick("example", () => sayFile(api.bytes(options.example)));
onClick("access", unlock, "submit");
onClick("prompting", () => usePrompt($("prompt").value.trim()), "submit");
onClick("file", async ({ target }) => {
  const [file] = target.files;
  target.value = ""; // the same file may be chosen again
  if (file) await sayFile(file.arrayBuffer());
}, "change");
onClick("upload", async ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (file) await upload(file);
}, "change");
$("prompt").addEventListener("input", markPrompt);
window.addEventListener("pagehide", end);

try {
  await load();
} catch (error) {
  if (error.status === 401) $("access").hidden = false;
  else fail(error);
}
