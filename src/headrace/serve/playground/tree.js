// The radix tree as a river that branches: each run of blocks without a fork is one channel, left to right.

const SVG = "http://www.w3.org/2000/svg";
const ROW = 24, EDGE = 6, LEAST = 30;

function make(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Rows of (id, parent, tokens, holders, text) as channels: {id, blocks, tokens, held, text, children}.
function channels(rows) {
  const children = new Map();
  for (const row of rows) {
    if (!children.has(row[1])) children.set(row[1], []);
    children.get(row[1]).push(row);
  }
  const grow = (row) => {
    const channel = { id: row[0], blocks: 0, tokens: 0, held: row[3], texts: [], children: [] };
    let below = [row];
    while (below.length === 1 && (channel.blocks === 0 || below[0][3] === channel.held)) {
      const [id, , tokens, , text] = below[0];
      channel.blocks += 1;
      channel.tokens += tokens;
      channel.texts.push(text);
      below = children.get(id) ?? [];
    }
    channel.children = bySize(below.map(grow));
    channel.size = channel.blocks + channel.children.reduce((sum, child) => sum + child.size, 0);
    return channel;
  };
  return bySize((children.get(-1) ?? []).map(grow));
}

// The broadest first, where the tree is most of a tree.
function bySize(list) {
  return list.sort((a, b) => b.children.length - a.children.length || b.size - a.size || a.id - b.id);
}

// What a channel says: special tokens, which look alike in every chat, become a mark.
function label(texts, room) {
  const text = texts.join("").replaceAll(/(?:<\|?[^<>]{1,24}\|?>)+/g, "\u25B8").replaceAll(/\s+/g, " ").trim();
  return text.length > room ? `${text.slice(0, room - 1)}\u2026` : text;
}

function place(list, depth, state) {
  for (const channel of list) {
    channel.from = depth;
    channel.to = depth + channel.blocks;
    state.deepest = Math.max(state.deepest, channel.to);
    if (channel.children.length) {
      place(channel.children, channel.to, state);
      channel.y = (channel.children[0].y + channel.children.at(-1).y) / 2;
    } else {
      channel.y = state.leaves;
      state.leaves += 1;
    }
  }
}

export class Tree {
  constructor(svg, empty, line) {
    Object.assign(this, { svg, empty, line, rows: [], known: new Set(), key: "" });
  }

  take({ nodes, complete }, blockSize) {
    this.rows = nodes;
    this.complete = complete;
    this.blockSize = blockSize;
    this.svg.dataset.nodes = String(nodes.length);
  }

  draw() {
    const width = this.svg.parentElement.clientWidth - 16;
    const key = `${width}:${JSON.stringify(this.rows)}`;
    if (width <= 0 || key === this.key) return;
    this.key = key;
    this.empty.hidden = this.rows.length > 0;
    const roots = channels(this.rows), state = { leaves: 0, deepest: 1 };
    place(roots, 0, state);
    const height = Math.max(state.leaves * ROW + EDGE, LEAST);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("width", String(width));
    this.svg.setAttribute("height", String(this.rows.length ? height : 0));
    const x = (depth) => 4 + Math.min(depth / state.deepest, 1) * (width - 8);
    const y = (row) => row * ROW + ROW - EDGE;
    const lines = [], words = [];
    for (const root of roots) this.#channel(root, null, x, y, lines, words);
    this.svg.replaceChildren(...lines, ...words);
    this.known = new Set(this.rows.map((row) => row[0]));
    const held = this.rows.filter((row) => row[3] > 0).length;
    const told = this.rows.length
      ? `${this.rows.length}${this.complete ? "" : "+"} blocks in ${state.leaves} ${state.leaves === 1 ? "branch" : "branches"} · ${held} in use`
      : "";
    this.line.textContent = told;
    this.svg.setAttribute("aria-label", told ? `The prefix tree: ${told}` : "The prefix tree is empty");
  }

  #channel(channel, parent, x, y, lines, words) {
    const kind = `${channel.held ? "held" : "kept"}${this.known.has(channel.id) ? "" : " new"}`;
    const from = x(channel.from), to = x(channel.to), at = y(channel.y);
    let path = `M${from} ${at}H${to - 3}`;
    if (parent) {
      const bend = Math.min((to - from) * 0.6, 16);
      const above = y(parent.y);
      path = `M${from - 3} ${above}C${from + bend * 0.6} ${above} ${from} ${at} ${from + bend} ${at}H${to - 3}`;
    }
    const group = make("g", { class: `channel ${kind}` });
    const thick = 2.5 + Math.min(Math.log2(1 + channel.held) * 1.4, 5);
    group.append(make("path", { d: path, "stroke-width": thick.toFixed(1) }));
    const pitch = (to - from) / channel.blocks;
    for (let i = 1; i < channel.blocks && pitch > 7; i += 1) {
      group.append(make("circle", { cx: (from + i * pitch - 3).toFixed(1), cy: at, r: 2 }));
    }
    group.append(make("circle", { cx: to - 3, cy: at, r: 3.2 }));
    const text = channel.texts.join(" … ");
    group.append(make("title", {}, `${channel.tokens} tokens in ${channel.blocks} blocks of ${this.blockSize}, `
      + `${channel.held ? `held by ${channel.held}` : "held by none"}\n${text}`));
    lines.push(group);
    const left = from + (parent ? 15 : 0);
    const right = channel.children.length ? to - 10 : x(Infinity);
    const room = Math.floor((right - left) / 6.1);
    if (room >= 3) words.push(make("text", { x: left, y: at - 6, class: kind }, label(channel.texts, room)));
    for (const child of channel.children) this.#channel(child, channel, x, y, lines, words);
  }
}
