// What the sampler is asked for. A field left as it was is not sent: the server's own default holds.

const FIELDS = [
  { name: "temperature", label: "Temperature", low: 0, high: 2, step: 0.05, start: 1, help: "0 always takes the likeliest" },
  { name: "top_p", label: "Top p", low: 0.05, high: 1, step: 0.05, start: 1, help: "Share of probability kept" },
  { name: "min_p", label: "Min p", low: 0, high: 1, step: 0.01, start: 0, help: "Least, beside the likeliest" },
  { name: "top_k", label: "Top k", low: 0, high: 100, step: 1, start: 0, help: "Tokens kept; 0 is all" },
  { name: "max_tokens", label: "Longest reply", low: 1, high: 1024, step: 1, start: 256, help: "Tokens", always: true },
];

export class Settings {
  constructor(box, summary, onChange) {
    this.summary = summary;
    this.onChange = onChange;
    this.starts = Object.fromEntries(FIELDS.map((field) => [field.name, field.start]));
    this.inputs = {};
    for (const field of FIELDS) box.append(this.#control(field));
    box.append(this.#seed());
    this.#tell();
  }

  // The server's defaults become the page's; what the user has changed stays.
  adopt(defaults, longest) {
    for (const field of FIELDS) {
      const [number, range] = this.inputs[field.name];
      const untouched = Number(number.value) === this.starts[field.name];
      if (field.name === "max_tokens") number.max = range.max = String(longest);
      const start = defaults?.[field.name];
      this.starts[field.name] = typeof start === "number" ? start : field.start;
      if (field.name === "max_tokens") this.starts.max_tokens = Math.min(this.starts.max_tokens, longest);
      if (untouched) number.value = range.value = String(this.starts[field.name]);
    }
    this.#tell();
  }

  reset() {
    for (const field of FIELDS) {
      for (const input of this.inputs[field.name]) input.value = String(this.starts[field.name]);
    }
    this.seed.value = "";
    this.#tell();
  }

  // Fields of a request.
  values() {
    const values = {};
    for (const field of FIELDS) {
      const value = this.#value(field);
      if (field.always || value !== this.starts[field.name]) values[field.name] = value;
    }
    const seed = Number.parseInt(this.seed.value, 10);
    if (Number.isSafeInteger(seed)) values.seed = seed;
    return values;
  }

  #value(field) {
    const value = Number.parseFloat(this.inputs[field.name][0].value);
    if (!Number.isFinite(value)) return this.starts[field.name];
    const high = Number(this.inputs[field.name][0].max);
    return Math.min(Math.max(field.step === 1 ? Math.round(value) : value, field.low), high);
  }

  #control(field) {
    const frame = document.createElement("div");
    frame.className = "field";
    const label = document.createElement("label");
    label.htmlFor = `set-${field.name}`;
    label.textContent = field.label;
    const help = document.createElement("small");
    help.id = `help-${field.name}`;
    help.textContent = field.help;
    const number = Object.assign(document.createElement("input"), { type: "number", id: `set-${field.name}`, inputMode: "decimal" });
    const range = Object.assign(document.createElement("input"), { type: "range", tabIndex: -1, ariaHidden: "true" });
    for (const input of [number, range]) {
      Object.assign(input, { min: String(field.low), max: String(field.high), step: String(field.step) });
      input.value = String(field.start);
      input.addEventListener("input", () => {
        const other = input === number ? range : number;
        other.value = input.value;
        this.#tell();
      });
    }
    number.setAttribute("aria-describedby", help.id);
    this.inputs[field.name] = [number, range];
    frame.append(label, number, range, help);
    return frame;
  }

  #seed() {
    const frame = document.createElement("div");
    frame.className = "field";
    const label = document.createElement("label");
    label.htmlFor = "set-seed";
    label.textContent = "Seed";
    this.seed = Object.assign(document.createElement("input"), {
      type: "text", id: "set-seed", inputMode: "numeric", pattern: "[0-9]*", placeholder: "a new one each time", autocomplete: "off",
    });
    this.seed.addEventListener("input", () => this.#tell());
    const help = document.createElement("small");
    help.textContent = "The same seed, the same reply";
    frame.append(label, this.seed, help);
    frame.classList.add("seed");
    return frame;
  }

  #tell() {
    const value = (name) => this.#value(FIELDS.find((field) => field.name === name));
    const parts = [`Temperature ${value("temperature")}`];
    if (value("top_p") < 1) parts.push(`top p ${value("top_p")}`);
    if (value("top_k") > 0) parts.push(`top k ${value("top_k")}`);
    if (value("min_p") > 0) parts.push(`min p ${value("min_p")}`);
    if (this.seed?.value) parts.push(`seed ${this.seed.value}`);
    this.summary.textContent = parts.join(" · ");
    this.onChange();
  }
}
