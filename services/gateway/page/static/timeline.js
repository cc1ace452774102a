// The timeline of batches on a canvas: one lane for each verifier, the present on the right.

const SPAN_MS = 10_000;
const LANE = 34;
const BAR = 18;
const AXIS = 20;
const NAMES = 116;
const NARROW_NAMES = 64;

export class Timeline {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.batches = [];
    this.runs = [];
    this.lanes = [];
    this.chosen = null;
    this.session = null;
    this.colours = null;
    this.nowMs = () => 0;
    addEventListener("themechange", () => (this.colours = null));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (this.colours = null));
  }

  add(item) {
    if (!this.lanes.includes(item.verifier)) {
      this.lanes.push(item.verifier);
      this.lanes.sort();
    }
    (item.kind === "run" ? this.runs : this.batches).push(item);
  }

  /** Forget what has left the picture. */
  forget(nowMs) {
    for (const items of [this.batches, this.runs]) {
      let old = 0;
      while (old < items.length && items[old].done_ms < nowMs - SPAN_MS - 1000) old++;
      if (old) items.splice(0, old);
    }
  }

  setLanes(names) {
    const shown = new Set([...names, ...this.batches.map((batch) => batch.verifier), ...this.runs.map((run) => run.verifier)]);
    this.lanes = [...shown].sort();
  }

  palette() {
    if (!this.colours) {
      const style = getComputedStyle(this.canvas);
      const read = (name) => {
        const probe = document.createElement("span");
        probe.style.color = `var(${name})`;
        this.canvas.parentElement.append(probe);
        const colour = getComputedStyle(probe).color;
        probe.remove();
        return colour;
      };
      this.colours = {
        font: `12px ${style.fontFamily}`,
        panel: read("--panel"), ink: read("--ink"), dim: read("--dim"), line: read("--line"),
        bars: [read("--bar-1"), read("--bar-2"), read("--bar-3"), read("--bar-4")],
        late: read("--late"), chosen: read("--chosen"), run: read("--run-ink"),
      };
    }
    return this.colours;
  }

  draw() {
    const { canvas, context } = this;
    const width = canvas.clientWidth;
    const height = Math.max(1, this.lanes.length) * LANE + AXIS;
    const scale = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.height = `${height}px`;
    }
    const names = width < 560 ? NARROW_NAMES : NAMES;
    const colours = this.palette();
    const nowMs = this.nowMs();
    this.names = names;
    this.perMs = (width - names - 4) / SPAN_MS;
    this.fromMs = nowMs - SPAN_MS;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.fillStyle = colours.panel;
    context.fillRect(0, 0, width, height);
    context.font = colours.font;
    context.textBaseline = "middle";
    this.drawAxis(colours, names, width, height);
    const laneOf = new Map(this.lanes.map((name, i) => [name, i]));
    context.save();
    context.beginPath();
    context.rect(names, 0, width - names, height);
    context.clip();
    this.drawBatches(colours, laneOf);
    this.drawRuns(colours, laneOf);
    context.restore();
    context.fillStyle = colours.ink;
    this.lanes.forEach((name, i) => context.fillText(clipped(context, name, names - 8), 0, i * LANE + LANE / 2));
  }

  drawAxis(colours, names, width, height) {
    const { context } = this;
    context.strokeStyle = colours.line;
    context.fillStyle = colours.dim;
    context.lineWidth = 1;
    context.beginPath();
    for (let second = 0; second <= 10; second += 2) {
      const x = Math.round(names + second * 1000 * this.perMs) + 0.5;
      context.moveTo(x, 0);
      context.lineTo(x, height - AXIS + 4);
    }
    context.stroke();
    context.textAlign = "center";
    for (let second = 0; second < 10; second += 2) {
      if (second || names > 20) context.fillText(`−${10 - second} s`, names + second * 1000 * this.perMs, height - 7);
    }
    context.textAlign = "right";
    context.fillText("now", width - 2, height - 7);
    context.textAlign = "left";
  }

  x(ms) {
    return this.names + (ms - this.fromMs) * this.perMs;
  }

  drawBatches(colours, laneOf) {
    const { context } = this;
    // Bars of one colour together: changing the colour is what costs time.
    const groups = [[], [], [], []];
    const chosen = [];
    for (const batch of this.batches) {
      const x = this.x(batch.done_ms - batch.measured_ms);
      const wide = Math.max(1.5, batch.measured_ms * this.perMs);
      if (x + wide < this.names) continue;
      const y = laneOf.get(batch.verifier) * LANE + (LANE - BAR) / 2;
      const jobs = batch.jobs.length;
      const bar = [x, y, Math.max(1, wide - 0.5), BAR, batch];
      groups[jobs >= 8 ? 3 : jobs >= 4 ? 2 : jobs >= 2 ? 1 : 0].push(bar);
      if (batch.id === this.chosen || (this.session && batch.jobs.some((job) => job.session === this.session))) chosen.push(bar);
    }
    groups.forEach((bars, i) => {
      context.fillStyle = colours.bars[i];
      for (const [x, y, wide, tall] of bars) context.fillRect(x, y, wide, tall);
    });
    context.fillStyle = colours.late;
    for (const bars of groups) {
      for (const [x, y, , , batch] of bars) {
        if (batch.predicted_ms) context.fillRect(x, y + BAR + 2, Math.max(1, batch.predicted_ms * this.perMs - 0.5), 2);
      }
    }
    context.fillStyle = colours.chosen;
    for (const [x, y, wide, tall, batch] of chosen) {
      context.fillRect(x, y - 4, Math.max(2, wide), 3);
      if (batch.id === this.chosen) context.fillRect(x, y, Math.max(2, wide), tall);
    }
  }

  drawRuns(colours, laneOf) {
    const { context } = this;
    context.fillStyle = colours.run;
    for (const run of this.runs) {
      const x = this.x(run.done_ms);
      if (x < this.names) continue;
      context.fillRect(x, laneOf.get(run.verifier) * LANE + 4, this.session === run.session ? 3 : 1.5, 4);
    }
  }

  /** The batch at a place of the canvas; null if there is none. */
  at(x, y) {
    const name = this.lanes[Math.floor(y / LANE)];
    let best = null;
    let distance = 12;
    for (const batch of this.batches) {
      if (batch.verifier !== name) continue;
      const from = this.x(batch.done_ms - batch.measured_ms);
      const to = Math.max(from + 1.5, this.x(batch.done_ms));
      const away = x < from ? from - x : x > to ? x - to : 0;
      if (away < distance) [best, distance] = [batch, away];
    }
    return best;
  }
}

function clipped(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let end = text.length - 1;
  while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > width) end--;
  return `${text.slice(0, end)}…`;
}
