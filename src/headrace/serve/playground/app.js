// The page: a chat, its keys, and what happens when something goes wrong.

import { ServerError, events, get, setKey } from "./api.js";
import { Picture } from "./live.js";
import { Settings } from "./settings.js";
import { hideHint, watchTokens } from "./tokens.js";
import { Transcript } from "./transcript.js";

const TOP = 5;  // alternatives asked for beside each token
const STARTERS = {
  chat: ["Who are you?", "Write a list of three colours.", "Tell me a short story."],
  text: ["Once upon a time", "One day, a little girl named Lily", "The old man looked at the sea and"],
};

const at = (id) => document.getElementById(id);
const prompt = at("prompt"), log = at("log"), notice = at("notice");
const transcript = new Transcript(log, at("welcome"));
const settings = new Settings(at("controls"), at("summary"), () => {});
let model = null;        // {id, chat}: chat is false once the server said that it has no template
let logprobs = TOP;      // null once the server refused them
let running = null;      // the AbortController of the reply that streams
let retry = null;

// ---- notices

function tell(text, { again = null, key = false } = {}) {
  at("notice-text").textContent = text;
  at("key-form").hidden = !key;
  at("retry").hidden = again === null;
  retry = again;
  notice.hidden = false;
  if (key) at("key").focus();
}

function untell() {
  notice.hidden = true;
  retry = null;
}

function explain(error) {
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  switch (error.status) {
    case 0: return error.message;
    case 401: return "This server asks for an API key.";
    case 429: return `Too many requests wait already.${wait || " Try again in a moment."}`;
    case 503: return `The engine cannot serve this now: ${error.message.replace(/[^.!?]$/, "$&.")}${wait}`;
    default: return error.message;
  }
}

// ---- the model

async function findModel() {
  const list = await get("v1/models");
  const card = list.data[0];
  model = { id: card.id, chat: card.chat_template !== false };
  settings.adopt(card.default_sampling_params, Math.max(1, card.max_model_len ?? 1024));
  at("model").textContent = card.id;
  document.title = `${card.id} · headrace`;
  offer();
}

function offer() {
  const words = STARTERS[model.chat ? "chat" : "text"];
  at("starters").replaceChildren(...words.map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => { prompt.value = text; send(); });
    return button;
  }));
  const title = at("welcome").querySelector("h1");
  title.textContent = model.chat ? "Ask it something." : "Begin, and it goes on.";
  prompt.placeholder = model.chat ? "Write a message" : "Write the beginning of a text";
}

// ---- a request

// The JSON in a box; undefined where it is empty. Throws a ServerError, which is shown as the server's are.
function json(id, name) {
  const text = at(id).value.trim();
  if (!text) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new ServerError(400, `${name}: this is no JSON: ${error.message}`, { param: id });
  }
}

function request() {
  const system = at("system").value.trim();
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, explain: true,
    ...settings.values() };
  const said = transcript.messages.map(({ turn, ...message }) => message);
  const schema = json("schema", "The schema");
  if (schema !== undefined) body.response_format = { type: "json_schema", json_schema: { name: "reply", schema } };
  if (model.chat) {
    body.messages = system ? [{ role: "system", content: system }, ...said] : said;
    body.tools = json("tools", "The tools");
    if (logprobs !== null) Object.assign(body, { logprobs: true, top_logprobs: logprobs });
    return ["v1/chat/completions", body];
  }
  body.prompt = (system ? `${system}\n` : "") + said.map(({ content }) => content).join("");
  if (logprobs !== null) body.logprobs = logprobs;
  return ["v1/completions", body];
}

function news(choice) {
  const text = choice.delta ? choice.delta.content ?? "" : choice.text ?? "";
  const told = choice.logprobs;
  if (!told) return [text, []];
  if (told.content) {
    return [text, told.content.map((entry) => ({ token: entry.token, logprob: entry.logprob, top: entry.top_logprobs ?? [] }))];
  }
  return [text, (told.tokens ?? []).map((token, i) => ({
    token,
    logprob: told.token_logprobs[i] ?? 0,
    top: Object.entries(told.top_logprobs?.[i] ?? {}).map(([name, logprob]) => ({ token: name, logprob })),
  }))];
}

async function send() {
  const text = prompt.value;
  if (running || !text.trim()) return;
  untell();
  try {
    if (!model) await findModel();
  } catch (error) {
    fail(error, send);
    return;
  }
  prompt.value = "";
  fit();
  transcript.say(model.chat ? text.trim() : text);
  await answer();
}

async function answer() {
  const mine = running = new AbortController();
  busy(true);
  const reply = transcript.reply();
  let reason = null, usage = null, explanation = null;
  try {
    const [path, body] = request();
    for await (const chunk of events(path, { body, signal: mine.signal })) {
      usage = chunk.usage ?? usage;
      explanation = chunk.explanation ?? explanation;
      for (const choice of chunk.choices ?? []) {
        reply.add(...news(choice), choice.accepted_drafts ?? []);
        reply.note(choice.delta?.reasoning_content, choice.delta?.tool_calls);
        reason = choice.finish_reason ?? reason;
      }
    }
    reply.end(reason, usage, explanation);
    prompt.placeholder = transcript.awaited ? `Write what ${transcript.awaited.function.name} returns` : "Write a message";
    at("said").textContent = reply.tokens.text;
  } catch (error) {
    stumble(error, reply, usage);
  } finally {
    if (running === mine) {
      running = null;
      busy(false);
    }
  }
}

// A reply that broke off: what came stays; what brought nothing goes back to where it was written.
function stumble(error, reply, usage) {
  if (reply.gone) return;  // a new chat has begun
  if (!(error instanceof ServerError) && error.name !== "AbortError") {
    reply.drop();
    throw error;
  }
  if (!reply.empty) {
    reply.end(error.name === "AbortError" ? "stopped" : "cut off", usage, null);
  } else {
    reply.drop();
    const text = transcript.unsay();
    if (!prompt.value) prompt.value = text;
    fit();
  }
  if (error.name === "AbortError") at("said").textContent = "Stopped.";
  else if (!adapt(error)) fail(error, reply.empty ? send : null);
}

// The server says what it cannot do: ask for less, at once. True if that was it.
function adapt(error) {
  if (error.status !== 400) return false;
  if (model.chat && /chat template/i.test(error.message)) {
    model.chat = false;
    offer();
  } else if (logprobs !== null && (/logprobs/.test(error.param ?? "") || /logprobs/.test(error.message))) {
    logprobs = logprobs > 0 ? 0 : null;
  } else {
    return false;
  }
  queueMicrotask(send);
  return true;
}

function fail(error, again) {
  if (!(error instanceof ServerError)) throw error;
  tell(explain(error), { again, key: error.status === 401 });
}

function busy(on) {
  const button = at("send");
  document.body.classList.toggle("busy", on);
  button.setAttribute("aria-label", on ? "Stop" : "Send");
  button.title = on ? "Stop (Esc)" : "Send (Enter)";
}

function stop() {
  running?.abort();
}

function newChat() {
  stop();
  running = null;
  busy(false);
  untell();
  transcript.clear();
  prompt.focus();
}

// ---- keys and buttons

function fit() {
  prompt.style.blockSize = "auto";
  prompt.style.blockSize = `${Math.min(prompt.scrollHeight, innerHeight * 0.4)}px`;
}

// On a narrow screen there is room for the sampling or the engine, not for both.
function showSettings(open) {
  at("tune").setAttribute("aria-expanded", String(open));
  at("settings").hidden = !open;
  if (open) showEngine(false);
}

function showEngine(open) {
  document.querySelector(".engine").dataset.open = String(open);
  at("fold").setAttribute("aria-expanded", String(open));
  if (open) showSettings(false);
  picture.draw();
}

function typing(element) {
  return element instanceof HTMLElement && element.matches("input:not([type=range], [type=checkbox]), textarea");
}

document.addEventListener("keydown", (event) => {
  if (event.key === "k" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    newChat();
  } else if (event.key === "/" && !typing(event.target) && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    prompt.focus();
  } else if (event.key === "Escape" && !event.isComposing) {
    if (hideHint()) return;
    if (running) stop();
    else if (!at("settings").hidden) { showSettings(false); at("tune").focus(); }
    else if (!notice.hidden) untell();
  }
});

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
prompt.addEventListener("input", fit);
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) stop(); else send();
});
at("new").addEventListener("click", newChat);
at("tune").addEventListener("click", () => showSettings(at("settings").hidden));
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("reset").addEventListener("click", () => {
  settings.reset();
  for (const box of ["system", "schema", "tools"]) at(box).value = "";
});
at("dismiss").addEventListener("click", untell);
at("retry").addEventListener("click", () => { const again = retry; untell(); again?.(); });
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(at("key").value.trim());
  at("key").value = "";
  untell();
  picture.hurry();
  if (prompt.value.trim()) send();
  else findModel().catch((error) => fail(error, null));
});

at("tint").addEventListener("change", () => log.classList.toggle("tinted", at("tint").checked));
log.classList.toggle("tinted", at("tint").checked);
watchTokens(log);

// ---- colours: the system's, or one of two

const THEMES = { "": ["light", "as the system has them"], light: ["dark", "light"], dark: ["", "dark"] };
at("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const next = THEMES[root.dataset.theme ?? ""][0];
  if (next) root.dataset.theme = next; else delete root.dataset.theme;
  at("theme").title = `Colours: ${THEMES[next][1]}`;
  try { localStorage.setItem("headrace.theme", next); } catch { /* it lasts as long as the page */ }
  picture.draw();
});

// ---- the engine beside it

at("fold").addEventListener("click", () => showEngine(at("fold").getAttribute("aria-expanded") !== "true"));
const picture = new Picture((error) => fail(error, null));
picture.start();
findModel().catch((error) => fail(error, () => findModel().catch((failure) => fail(failure, null))));
prompt.focus({ preventScroll: true });
