// The live picture: frames from /playground/live, put into numbers and drawings. It comes back by itself.

import { ServerError, events } from "./api.js";
import { drawBlocks, drawSteps, stepAt } from "./charts.js";
import { Tree } from "./tree.js";

const at = (id) => document.getElementById(id);
const STEPS = 120;
const WORDS = {
  starting: "starting", ready: "ready", restarting: "restarting", failed: "failed",
  draining: "shutting down", stopped: "stopped", offline: "offline", locked: "locked",
};
const WAITS = [500, 1000, 2000, 5000];  // ms before another try

export class Picture {
  constructor(onRefused) {
    this.onRefused = onRefused;
    this.steps = [];
    this.stats = null;
    this.info = null;
    this.rates = [];
    this.tree = new Tree(at("tree"), at("tree-empty"), at("tree-line"));
    this.control = null;
    this.tries = 0;
    this.wake = null;
    this.canvas = at("steps");
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#tellStep(null));
    new ResizeObserver(() => this.draw()).observe(at("panel"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.control?.abort(); else this.hurry();
    });
  }

  // Try again now.
  hurry() {
    this.tries = 0;
    this.wake?.();
  }

  async start() {
    while (true) {
      if (!document.hidden) await this.#watch();
      const wait = WAITS[Math.min(this.tries, WAITS.length - 1)];
      this.tries += 1;
      await new Promise((resolve) => {
        this.wake = resolve;
        if (!document.hidden) setTimeout(resolve, wait);
      });
    }
  }

  async #watch() {
    this.control = new AbortController();
    try {
      for await (const frame of events("playground/live", { signal: this.control.signal })) {
        this.tries = 0;
        this.#take(frame);
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ServerError)) throw error;
      if (error.status === 401 && this.tries === 0) this.onRefused(error);
      if (error.status === 401) { this.#state("locked"); return; }
    }
    this.#state("offline");
  }

  #take(frame) {
    if (frame.info) {
      this.info = frame.info;
      this.steps = [];
      this.rates = [];
      if (!at("model").textContent) at("model").textContent = frame.info.model;
    }
    this.stats = frame.stats;
    this.steps.push(...frame.steps);
    this.steps.splice(0, Math.max(0, this.steps.length - STEPS));
    this.count = frame.count;
    this.#state(frame.state);
    this.#numbers(frame);
    if (frame.tree) this.tree.take(frame.tree, this.info.block_size);
    requestAnimationFrame(() => this.draw());
  }

  #state(state) {
    at("state").dataset.state = state;
    at("state").lastElementChild.textContent = WORDS[state] ?? state;
    if (state !== "ready") at("fold-line").textContent = WORDS[state] ?? state;
  }

  #numbers({ time, stats, state }) {
    // Tokens a second over the last two seconds; a new engine counts from 0 again.
    const last = this.rates.at(-1);
    if (last && stats.generated_tokens < last[1]) this.rates = [];
    this.rates.push([time, stats.generated_tokens]);
    while (this.rates.length > 2 && time - this.rates[0][0] > 2) this.rates.shift();
    const [from, before] = this.rates[0];
    const speed = time > from ? (stats.generated_tokens - before) / (time - from) : 0;
    const tokens = speed >= 99.5 ? Math.round(speed).toLocaleString("en") : speed.toFixed(speed > 0 && speed < 10 ? 1 : 0);
    at("running").textContent = stats.num_running;
    at("waiting").textContent = stats.num_waiting;
    at("speed").textContent = tokens;
    at("hits").textContent = stats.prefix_queries ? `${Math.round(stats.prefix_hits / stats.prefix_queries * 100)}%` : "–";
    if (state === "ready") {
      at("fold-line").textContent = `${stats.num_running} running · ${tokens} tokens/s · ${Math.round(stats.kv_usage * 100)}% of KV`;
    }
  }

  draw() {
    if (!this.info) return;
    drawSteps(this.canvas, this.steps, STEPS);
    this.canvas.dataset.count = String(this.count);
    const last = this.steps.at(-1);
    if (last) this.canvas.setAttribute("aria-label", `The last ${this.steps.length} steps. ${words(last)}`);
    const held = this.stats.physical_blocks, cached = this.stats.cached_blocks, all = this.info.kv_blocks;
    const free = Math.max(0, all - held - cached);
    drawBlocks(at("blocks"), { held, cached, all });
    const size = this.info.block_size;
    const waste = this.stats.held_slots ? 1 - this.stats.used_slots / this.stats.held_slots : 0;
    const line = `${number(held)} held, ${number(cached)} cached, ${number(free)} free · ${size} tokens each`
      + (held ? ` · ${Math.round(waste * 100)}% waste` : "");
    at("blocks").setAttribute("aria-label", line);
    at("blocks-line").textContent = line;
    this.tree.draw();
  }

  #point(event) {
    const index = stepAt(this.canvas, event.offsetX, this.steps.length, STEPS);
    this.#tellStep(index === null ? null : this.steps[index]);
  }

  #tellStep(step) {
    at("step-line").textContent = step ? words(step) : "One bar a step: the tokens it computed.";
  }
}

function number(value) {
  return value.toLocaleString("en");
}

function words([prefill, decode, milliseconds, running]) {
  return `${number(prefill)} prefill, ${number(decode)} decode · ${milliseconds} ms · ${running} running`;
}
