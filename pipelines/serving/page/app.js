// The page: a conversation with a model of this server.

import * as client from "./client.js";
import { clear, edit, startComposer, tell } from "./composer.js";
import { curl } from "./curl.js";
import { $, sizeText } from "./dom.js";
import { showExamples } from "./examples.js";
import { multiTurn, settings, showSettings } from "./settings.js";
import { Turn, announce, copying } from "./turn.js";

let facts;
let turns = [];
let running = null; // the AbortController of the answer that is being generated
let afterKey = null; // what to do again once there is a key
let following = true; // the end of the page is in sight

async function start() {
  try {
    facts ??= await client.facts();
    showExamples(facts.examples, guarded(ask));
    showSettings(await client.models(), facts);
    $("problem").hidden = true;
  } catch (failure) {
    if (!wantsKey(failure, start)) complain(failure);
  }
}

/** What a request says: the messages, and the files that are in them in this order. */
async function conversation(question, media) {
  const before = turns.filter(({ kept }) => kept);
  if (!multiTurn()) {
    const files = media.length ? media : (before.findLast((turn) => turn.media.length)?.media ?? []);
    return { messages: [await asked(question, files)], seen: files };
  }
  const messages = [];
  for (const turn of before) messages.push(await asked(turn.question, turn.media), { role: "assistant", content: turn.text });
  messages.push(await asked(question, media));
  return { messages, seen: [...before.flatMap((turn) => turn.media), ...media] };
}

async function asked(question, media) {
  if (!media.length) return { role: "user", content: question };
  const parts = await Promise.all(media.map((medium) => medium.part()));
  return { role: "user", content: [...parts, { type: "text", text: question }] };
}

async function ask(question, media) {
  await ready; // whoever is quicker than the server's list of models
  const chosen = running ? null : settings();
  if (!chosen) return;
  const control = new AbortController();
  running = control;
  tell("");
  try {
    const { messages, seen } = await conversation(question, media);
    const body = { ...chosen, messages };
    const size = JSON.stringify(body).length;
    if (size > facts.max_body_bytes) {
      tell(`Together with the conversation this has ${sizeText(size)}; the server takes ${sizeText(facts.max_body_bytes)}.`);
      return;
    }
    clear();
    const turn = new Turn(question, media, seen);
    turns.push(turn);
    $("turns").append(turn.element);
    busy(true);
    await generate(turn, body, control.signal);
  } finally {
    running = null;
    busy(false);
  }
}

async function generate(turn, body, signal) {
  const again = () => {
    drop(turn);
    return guarded(ask)(turn.question, turn.media);
  };
  const change = () => {
    drop(turn);
    edit(turn.question, turn.media);
  };
  const command = copying(() => curl(body, turn.seen, client.hasKey()));
  announce("Answering");
  following = true;
  try {
    for await (const event of client.answer(body, signal)) turn.take(event);
    turn.end({ Copy: copying(() => turn.text), "Copy as curl": command });
  } catch (failure) {
    if (signal.aborted) turn.stopped({ "Try again": again, "Copy as curl": command });
    else {
      turn.failed(inWords(failure, body, turn.seen), { "Try again": again, Edit: change, "Copy as curl": command });
      wantsKey(failure, again);
    }
  }
}

/** What a server says about a part of the request, with the file's name in place of the part's. */
function inWords(failure, body, media) {
  const place = /^messages\[(\d+)\]\.content\[(\d+)\]/.exec(failure.param ?? "");
  if (!place) return failure.message;
  const [message, part] = place.slice(1).map(Number);
  const isFile = ({ type }) => type !== "text";
  const before = body.messages.slice(0, message).flatMap(({ content }) => (Array.isArray(content) ? content.filter(isFile) : []));
  const file = media[before.length + part];
  return file ? failure.message.replace(`${failure.param}:`, `${file.name}:`) : failure.message;
}

function drop(turn) {
  turns = turns.filter((other) => other !== turn);
  turn.element.remove();
  welcome();
}

function welcome() {
  $("welcome").hidden = turns.length > 0;
  $("new").hidden = turns.length === 0;
}

function busy(on) {
  const focused = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = on;
  $("stop").hidden = !on;
  if (focused) (on ? $("stop") : $("send")).focus();
  $("turns").setAttribute("aria-busy", on);
  welcome();
}

/** Keeps the newest text in sight, unless the reader has scrolled away from it. */
function toEnd() {
  if (following) document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
}

/** Shows the field for the key if that is what is missing. */
function wantsKey(failure, again) {
  if (failure.status !== 401) return false;
  afterKey = again;
  $("key-problem").textContent = client.hasKey() ? failure.message : "";
  $("key-panel").hidden = false;
  $("key").focus();
  return true;
}

function complain(failure) {
  $("problem").textContent = failure.message;
  $("problem").hidden = false;
}

/** The same function, whose errors are shown. */
const guarded = (act) => (...given) => act(...given).catch(complain);

$("key-panel").addEventListener("submit", (event) => {
  event.preventDefault();
  client.useKey($("key").value);
  $("key-problem").textContent = "";
  $("key-panel").hidden = true;
  afterKey();
});
$("stop").addEventListener("click", () => {
  running?.abort();
  $("question").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented) running?.abort();
});
$("new").addEventListener("click", () => {
  running?.abort();
  for (const turn of [...turns]) drop(turn);
  $("question").focus();
});
addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = document.scrollingElement;
  following = scrollHeight - scrollTop - clientHeight < 80;
});
new ResizeObserver(toEnd).observe($("turns"));

startComposer(guarded(ask));
const ready = start();
