// Drawings on canvas, with the style sheet's colours.

// A colour as the page has it now: a canvas knows neither variables nor schemes, so an element is asked.
function colours(canvas) {
  return (name) => {
    canvas.style.color = `var(${name})`;
    return getComputedStyle(canvas).color;
  };
}

// A context of the canvas's size on the page, in CSS pixels, cleared.
function ready(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

const LEFT = 30, FOOT = 1, HEAD = 6;

function nice(most) {
  for (let ten = 1; ; ten *= 10) {
    for (const digit of [1, 2, 5]) if (digit * ten >= most) return digit * ten;
  }
}

// Heights go with the square root, so that one decoded token is seen beside a prompt of hundreds.
export function drawSteps(canvas, steps, room) {
  const { context, width, height } = ready(canvas);
  if (!width || !height) return;
  const colour = colours(canvas);
  const most = nice(Math.max(4, ...steps.map(([prefill, decode]) => prefill + decode)));
  const floor = height - FOOT;
  const y = (tokens) => floor - Math.sqrt(tokens / most) * (floor - HEAD);
  context.font = `10px ${getComputedStyle(document.documentElement).getPropertyValue("--mono")}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const tokens of steps.length ? [most, nice(most / 4)] : []) {
    context.fillStyle = colour("--line");
    context.fillRect(LEFT, Math.round(y(tokens)), width - LEFT, 1);
    context.fillStyle = colour("--muted");
    context.fillText(tokens >= 1000 ? `${tokens / 1000}k` : String(tokens), LEFT - 6, Math.max(y(tokens), 6));
  }
  context.fillStyle = colour("--line");
  context.fillRect(LEFT, floor, width - LEFT, 1);
  const pitch = (width - LEFT) / room, bar = Math.max(pitch - (pitch > 2.4 ? 1 : 0.4), 1);
  steps.forEach(([prefill, decode], i) => {
    const x = width - (steps.length - i) * pitch;
    context.fillStyle = colour("--decode");
    if (decode) context.fillRect(x, y(decode), bar, floor - y(decode));
    context.fillStyle = colour("--prefill");
    if (prefill) context.fillRect(x, y(decode + prefill), bar, y(decode) - y(decode + prefill));
  });
}

// Which step is at x: an index, or null.
export function stepAt(canvas, x, count, room) {
  const index = count - Math.ceil((canvas.clientWidth - x) / ((canvas.clientWidth - LEFT) / room));
  return x >= LEFT && index >= 0 && index < count ? index : null;
}

// The pool as cells: each a block, or an equal share of them. What is there at all has a cell at least.
export function drawBlocks(canvas, { held, cached, all }) {
  const { context, width, height } = ready(canvas);
  if (!width || !height || !all) return;
  const colour = colours(canvas);
  const rows = 6, pitch = height / rows, columns = Math.max(1, Math.floor(width / pitch));
  const cells = Math.min(rows * columns, all);
  const share = (count) => count ? Math.max(1, Math.round(count / all * cells)) : 0;
  const ends = [share(held), Math.min(share(held) + share(cached), cells)];
  const wide = width / columns, gap = 2;
  for (let cell = 0; cell < cells; cell += 1) {
    const x = Math.floor(cell / rows) * wide, y = cell % rows * pitch;
    context.fillStyle = colour(cell < ends[0] ? "--decode" : cell < ends[1] ? "--cached" : "--free");
    context.beginPath();
    context.roundRect(x, y, wide - gap, pitch - gap, 2);
    context.fill();
  }
}
