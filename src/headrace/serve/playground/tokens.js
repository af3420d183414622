// A reply as tokens: spans of its text, each with what the model thought, and the hint that tells it.

const SHADES = [0.9, 0.7, 0.5, 0.3, 0.15, 0.05];  // below each, one shade more

const hint = document.getElementById("hint");
let shown = null;

// An entry is {token, logprob, top: [{token, logprob}, …]}; the text of a reply may lag behind its tokens (a character
// can be made of several, a stop string is held back), and the end token has no text at all.
export class TokenText {
  constructor(element) {
    this.element = element;
    this.entries = [];
    this.count = 0;
    this.accepted = new Set();  // places among all tokens; a token may come after its place
    this.drafted = 0;  // spans that are marked
    this.text = "";
    element.addEventListener("keydown", (event) => this.#walk(event));
  }

  add(text, entries, accepted) {
    for (const place of accepted) this.accepted.add(place);
    this.entries.push(...entries.map((entry, i) => ({ ...entry, drafted: this.accepted.has(this.count + i) })));
    this.count += entries.length;
    this.text += text;
    let left = text;
    while (left && this.entries.length) {
      const length = this.#matches(left, this.entries[0]);
      if (!length) break;
      this.#span(left.slice(0, length), [this.entries.shift()]);
      left = left.slice(length);
    }
    if (left) this.#span(left, this.entries.splice(0));
  }

  // Tokens that brought no text are shown by their names.
  end() {
    for (const entry of this.entries.splice(0)) this.#span(entry.token || "end", [entry], "silent");
  }

  #matches(text, entry) {
    if (!entry.token) return 0;
    if (text.startsWith(entry.token)) return entry.token.length;
    const bare = entry.token.trimStart();  // sentencepiece drops the first space of a text
    return !this.element.firstChild && bare && text.startsWith(bare) ? bare.length : 0;
  }

  #span(text, entries, kind = "") {
    if (!entries.length) {
      this.element.append(document.createTextNode(text));
      return;
    }
    const span = document.createElement("span");
    const p = Math.exp(entries.reduce((sum, entry) => sum + entry.logprob, 0));
    // Of several tokens in one text, such as the bytes of a character, all must have been drafted.
    const drafted = entries.every((entry) => entry.drafted);
    if (drafted) this.drafted += 1;
    span.className = `token s${SHADES.filter((edge) => p < edge).length} ${kind}`.trim();
    span.classList.toggle("drafted", drafted);
    span.textContent = text;
    span.tabIndex = this.element.querySelector(".token") ? -1 : 0;
    span.entries = entries;
    span.setAttribute("aria-label", `${text}, ${percent(p)}${drafted ? ", drafted" : ""}`);
    this.element.append(span);
  }

  #walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !event.target.classList.contains("token")) return;
    const all = [...this.element.querySelectorAll(".token")];
    const next = all[all.indexOf(event.target) + step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

function percent(p) {
  return p >= 0.0995 ? `${(p * 100).toFixed(0)}%` : p >= 0.001 ? `${(p * 100).toFixed(1)}%` : "<0.1%";
}

function visible(token) {
  return token === "" ? "(nothing)" : token.replaceAll("\n", "\u23CE").replaceAll("\t", "\u21E5").replaceAll(" ", "\u00B7");
}

function row(token, logprob, chosen) {
  const line = document.createElement("div");
  line.className = chosen ? "alt chosen" : "alt";
  const name = document.createElement("code");
  name.textContent = visible(token);
  const bar = document.createElement("i");
  const fill = document.createElement("b");
  fill.style.inlineSize = `${Math.max(Math.exp(logprob) * 100, 0.8)}%`;
  bar.append(fill);
  const share = document.createElement("span");
  share.textContent = percent(Math.exp(logprob));
  line.append(name, bar, share);
  return line;
}

function table(entry) {
  const box = document.createElement("div");
  const head = document.createElement("p");
  head.textContent = `log p ${entry.logprob.toFixed(3).replace(/^-(?=0\.0+$)/, "").replace("-", "\u2212")}`;
  if (entry.drafted) head.textContent += " \u00B7 drafted";
  box.append(head);
  const rows = [...entry.top];
  if (!rows.some((other) => other.token === entry.token)) rows.push({ token: entry.token, logprob: entry.logprob });
  rows.sort((a, b) => b.logprob - a.logprob);
  for (const other of rows) box.append(row(other.token, other.logprob, other.token === entry.token));
  return box;
}

export function hideHint() {
  const was = shown;
  shown?.removeAttribute("aria-describedby");
  shown = null;
  hint.hidden = true;
  return was !== null;
}

function show(span) {
  if (shown === span) return;
  hideHint();
  shown = span;
  hint.replaceChildren(...span.entries.slice(0, 3).map(table));
  hint.hidden = false;
  span.setAttribute("aria-describedby", "hint");
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const width = hint.offsetWidth, height = hint.offsetHeight, edge = 8;
  const left = Math.min(Math.max(at.left + at.width / 2 - width / 2, edge), innerWidth - width - edge);
  const above = at.top - height - 6;
  hint.style.left = `${left}px`;
  hint.style.top = `${above >= edge ? above : Math.min(at.bottom + 6, innerHeight - height - edge)}px`;
}

export function watchTokens(log) {
  const target = (event) => event.target instanceof Element ? event.target.closest(".token") : null;
  for (const kind of ["pointerover", "focusin"]) {
    log.addEventListener(kind, (event) => {
      const span = target(event);
      if (span) show(span); else if (kind === "pointerover" && !shown?.matches(":focus-visible")) hideHint();
    });
  }
  log.addEventListener("pointerleave", () => { if (!shown?.matches(":focus-visible")) hideHint(); });
  log.addEventListener("focusout", hideHint);
  log.addEventListener("scroll", hideHint, { passive: true });
}
