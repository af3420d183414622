// The conversation: what is shown, and what is sent of it.

import { TokenText, hideHint } from "./tokens.js";

export class Transcript {
  constructor(log, welcome) {
    this.log = log;
    this.welcome = welcome;
    this.messages = [];
    this.follow = true;
    new ResizeObserver(() => this.scroll()).observe(log);
    log.addEventListener("scroll", () => {
      this.follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    }, { passive: true });
  }

  clear() {
    hideHint();
    this.messages = [];
    this.log.replaceChildren(this.welcome);
  }

  say(text) {
    this.welcome.remove();
    const turn = document.createElement("article");
    turn.className = "turn user";
    turn.setAttribute("aria-label", "You");
    const words = document.createElement("div");
    words.className = "words";
    words.textContent = text;
    turn.append(words);
    this.log.append(turn);
    const call = this.awaited;
    this.messages.push(call ? { role: "tool", tool_call_id: call.id, content: text, turn } : { role: "user", content: text, turn });
    this.follow = true;
    this.scroll();
  }

  // The first call of the last reply that has no result yet: what is written next is its result.
  get awaited() {
    const results = this.messages.filter(({ role }) => role === "tool").map((message) => message.tool_call_id);
    const last = this.messages.findLast(({ role }) => role === "assistant");
    return last?.tool_calls?.find(({ id }) => !results.includes(id)) ?? null;
  }

  // Take back the last message of the user, for another try.
  unsay() {
    const last = this.messages.pop();
    last.turn.remove();
    if (!this.messages.length) this.log.append(this.welcome);
    return last.content;
  }

  reply() {
    return new Reply(this);
  }

  scroll() {
    if (this.follow) this.log.scrollTop = this.log.scrollHeight;
  }
}

class Reply {
  constructor(transcript) {
    this.transcript = transcript;
    this.began = performance.now();
    this.firstToken = null;
    this.turn = document.createElement("article");
    this.turn.className = "turn reply pending";
    this.turn.setAttribute("aria-label", "Reply");
    const words = document.createElement("div");
    words.className = "words";
    this.facts = document.createElement("p");
    this.facts.className = "facts";
    this.turn.append(words, this.facts);
    transcript.log.append(this.turn);
    this.calls = [];
    this.tokens = new TokenText(words);
    transcript.scroll();
  }

  // Whether the conversation that it belongs to is over.
  get gone() {
    return !this.turn.isConnected;
  }

  get empty() {
    return this.tokens.count === 0 && this.tokens.text === "" && !this.calls.length && !this.thought;
  }

  // `accepted` are places, among all tokens of the reply, of those that were drafted.
  add(text, entries, accepted) {
    if (this.firstToken === null && (text || entries.length)) this.firstToken = performance.now();
    this.tokens.add(text, entries, accepted);
    if (this.tokens.drafted && !this.facts.firstChild) this.#tell(this.#drafts(null));
    this.transcript.scroll();
  }

  // Reasoning, and tool calls as a stream brings them: the first part has the name, later ones more of the arguments.
  note(reasoning, calls) {
    if (reasoning) {
      this.thought ??= this.#aside("thought");
      this.thought.textContent += reasoning;
    }
    for (const part of calls ?? []) {
      const call = this.calls[part.index] ??= { id: part.id, type: "function", function: { name: part.function.name, arguments: "" } };
      call.function.arguments += part.function.arguments ?? "";
      call.shown ??= this.#aside("call");
      call.shown.textContent = `${call.function.name} ${call.function.arguments}`;
    }
    this.transcript.scroll();
  }

  #aside(kind) {
    const element = Object.assign(document.createElement("div"), { className: kind });
    this.turn.insertBefore(element, kind === "thought" ? this.turn.firstChild : this.facts);
    return element;
  }

  // `reason` is a finish reason, or "stopped" where the user did it, or "cut off".
  end(reason, usage, explanation) {
    this.tokens.end();
    this.turn.classList.remove("pending");
    this.#tell(this.#facts(reason, usage, explanation));
    const message = { role: "assistant", content: this.tokens.text, turn: this.turn };
    if (this.calls.length) message.tool_calls = this.calls.map(({ shown, ...call }) => call);
    this.transcript.messages.push(message);
    this.transcript.scroll();
  }

  drop() {
    this.turn.remove();
  }

  #tell(facts) {
    this.facts.replaceChildren(...facts.map(([text, title, kind]) => {
      const fact = document.createElement("span");
      fact.textContent = text;
      if (title) fact.title = title;
      if (kind) fact.className = kind;
      return fact;
    }));
  }

  // How many drafts were right, underlined as their texts are: it is their legend too.
  #drafts(explanation) {
    const title = "Tokens that were guessed and computed together: a right one saves a step";
    const { drafted_tokens: drafted, accepted_tokens: accepted, gammas } = explanation ?? {};
    const counts = drafted ? `${accepted} of ${drafted} drafts right, γ ≤ ${Math.max(0, ...gammas)}` : null;
    if (this.tokens.drafted) return [[counts ?? "drafted", `Underlined: drafted. ${title}`, "drafted"]];
    return counts ? [[counts, title]] : [];
  }

  #facts(reason, usage, explanation) {
    const count = usage?.completion_tokens ?? this.tokens.count;
    const facts = [[`${count} ${count === 1 ? "token" : "tokens"}`]];
    if (this.firstToken !== null) {
      const seconds = (performance.now() - this.firstToken) / 1000;
      if (count > 9 && seconds > 0) facts.push([`${((count - 1) / seconds).toFixed(0)}/s`, "Tokens a second, after the first"]);
      facts.push([`first after ${(this.firstToken - this.began).toFixed(0)} ms`, "As this page saw it"]);
    }
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (cached !== undefined) {
      facts.push([`${cached} of ${usage.prompt_tokens} prompt tokens cached`, "Found in the prefix cache"]);
    }
    if (explanation?.forced_tokens) {
      facts.push([`${explanation.forced_tokens} forced`, "Tokens that the schema or the tools left no choice about: they were not sampled"]);
    }
    facts.push(...this.#drafts(explanation));
    if (explanation?.preemptions) facts.push([`preempted ${explanation.preemptions}×`, "Gave way to others, and was computed again"]);
    if (explanation?.resumes) facts.push([`resumed ${explanation.resumes}×`, "Went on in a new engine process"]);
    const ends = { length: "reached the longest reply", stopped: "stopped", "cut off": "cut off", abort: "stopped" };
    if (ends[reason]) facts.push([ends[reason]]);
    return facts;
  }
}
