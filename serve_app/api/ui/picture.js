// One replica's last steps on a canvas. Knows steps as serve_app/engine/recent_steps.py tells them; knows no network.

export const Kind = { DECODE: 0, CHUNK: 1, LAST_CHUNK: 2, OTHERS: 3 };
const [INDEX, STARTED, TOOK, TOKENS, RUNNING, WAITING, BLOCKS, PREEMPTED, PADDED, RUNS] = Array(10).keys();
const COLUMN = 9; // CSS pixels of one step, the gap of one pixel included
const LEFT = 42;
const BLOCKS_HEIGHT = 40;
const GAP = 16;
const IDLE_MS = 400; // a pause between two steps that is worth a mark

/** A step as an object. */
export function readStep(told) {
  const runs = [];
  for (let i = 0; i < told[RUNS].length; i += 4) {
    const [id, kind, tokens, again] = told[RUNS].slice(i, i + 4);
    runs.push({ id, kind, tokens, again });
  }
  return {
    index: told[INDEX], started: told[STARTED], took: told[TOOK], tokens: told[TOKENS], running: told[RUNNING],
    waiting: told[WAITING], blocks: told[BLOCKS], preempted: told[PREEMPTED], padded: told[PADDED], runs,
  };
}

export const nameOf = (id) => id.toString(16).padStart(8, "0").slice(0, 4);

export const plural = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

export function wordsOf(step, budget) {
  const count = (test) => step.runs.filter(test).length;
  const parts = [`step ${step.index.toLocaleString("en")}: ${step.tokens} of ${budget} tokens`];
  const decodes = count((run) => run.kind === Kind.DECODE);
  if (decodes) parts.push(plural(decodes, "decode"));
  const chunks = step.runs.filter((run) => run.kind === Kind.CHUNK || run.kind === Kind.LAST_CHUNK);
  if (chunks.length) {
    const some = chunks.slice(0, 4).map((run) => `${run.tokens} of ${nameOf(run.id)}`).join(", ");
    parts.push(`${plural(chunks.length, "chunk")} (${some}${chunks.length > 4 ? ", …" : ""})`);
  }
  const again = step.runs.reduce((sum, run) => sum + run.again, 0);
  if (again) parts.push(`${again} computed again`);
  if (step.preempted) parts.push(`${step.preempted} preempted`);
  if (step.padded) parts.push(`${step.padded} padded`);
  parts.push(`${plural(step.blocks, "block")} in use`, `${step.took.toFixed(1)} ms`);
  return parts.join("; ");
}

/** The colours, as the style sheet has them now. */
export function readColours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    runs: Array.from({ length: 8 }, (_, i) => of(`run-${i}`)),
    others: of("others"), blocks: of("blocks"), frame: of("frame"), text: of("text"), hint: of("hint"), line: of("line"),
    grid: of("grid"),
  };
}

/** Patterns, made once for each colour and scale: tone and stripes say the kind, so that colour need not. */
class Patterns {
  #made = new Map();

  constructor(scale) {
    this.scale = scale;
  }

  get(context, colour, crossed) {
    const key = colour + crossed;
    if (!this.#made.has(key)) this.#made.set(key, this.#make(context, colour, crossed));
    return this.#made.get(key);
  }

  #make(context, colour, crossed) {
    const size = Math.round(6 * this.scale);
    const tile = new OffscreenCanvas(size, size);
    const pen = tile.getContext("2d");
    pen.globalAlpha = 0.28;
    pen.fillStyle = colour;
    pen.fillRect(0, 0, size, size);
    pen.globalAlpha = 1;
    pen.strokeStyle = colour;
    pen.lineWidth = 1.6 * this.scale;
    pen.beginPath();
    for (const shift of [-size, 0, size]) {
      pen.moveTo(shift, size);
      pen.lineTo(shift + size, 0);
      if (crossed) {
        pen.moveTo(shift, 0);
        pen.lineTo(shift + size, size);
      }
    }
    pen.stroke();
    return context.createPattern(tile, "repeat");
  }
}

export class Picture {
  #queue = [];
  #columns = []; // {step} or {mark: "idle" | "missing", words}
  #drawn = 0; // 0: all of it must be drawn anew
  #patterns = null;
  #cursor = null; // index into columns of what is inspected
  #last = null;

  /** `isOwn(id)` and `isMoved(id)`: what main.js knows of a request. */
  constructor(canvas, colours, isOwn, isMoved) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.colours = colours;
    this.isOwn = isOwn;
    this.isMoved = isMoved;
    this.budget = 1;
    this.blocks = 1;
    this.numColumns = 0; // drawn since the beginning
    this.resize();
  }

  resize() {
    const { clientWidth, clientHeight } = this.canvas;
    this.scale = Math.max(1, Math.round(window.devicePixelRatio || 1));
    this.width = clientWidth;
    this.height = clientHeight;
    this.canvas.width = clientWidth * this.scale;
    this.canvas.height = clientHeight * this.scale;
    this.#patterns = new Patterns(this.scale);
    this.#drawn = 0;
  }

  setColours(colours) {
    this.colours = colours;
    this.#patterns = new Patterns(this.scale);
    this.#drawn = 0;
  }

  setLimits(budget, blocks) {
    if (budget === this.budget && blocks === this.blocks) return;
    this.budget = budget;
    this.blocks = blocks;
    this.#drawn = 0;
  }

  get lastStep() {
    return this.#last;
  }

  get capacity() {
    return Math.max(1, Math.floor((this.width - LEFT) / COLUMN));
  }

  /** Steps that it has already are left out. */
  push(steps) {
    for (const step of steps) {
      const before = this.#last;
      if (before && step.index <= before.index) continue;
      if (before) {
        const missing = step.index - before.index - 1;
        const pause = step.started - before.started - before.took;
        if (missing > 0) this.#queue.push({ mark: "missing", words: `${plural(missing, "step")} not shown` });
        else if (pause > IDLE_MS) this.#queue.push({ mark: "idle", words: `nothing to do for ${(pause / 1000).toFixed(1)} s` });
      }
      this.#queue.push({ step });
      this.#last = step;
    }
  }

  /** Draws what is due: a share of what waits, so that what came at once moves smoothly; all of it with `atOnce`. */
  draw(atOnce) {
    const waiting = this.#queue.length;
    const number = atOnce || waiting > 4 * this.capacity ? waiting : Math.ceil(waiting / 7);
    if (number) {
      const columns = this.#queue.splice(0, number);
      for (const column of columns) this.#columns.push(column);
      this.numColumns += number;
      const extra = this.#columns.length - this.capacity;
      if (extra > 0) {
        this.#columns.splice(0, extra);
        if (this.#cursor !== null) this.#cursor = Math.max(0, this.#cursor - extra);
      }
    }
    const left = this.#columns.length - number;
    if (this.#drawn === 0 || (number && left <= 0)) this.#drawAll();
    else if (number) this.#drawNew(number);
  }

  get #plotHeight() {
    return this.height - BLOCKS_HEIGHT - GAP - 8;
  }

  /** Height of so many tokens from the floor: by the square root. */
  #rise(tokens) {
    return Math.sqrt(Math.min(1, tokens / this.budget)) * this.#plotHeight;
  }

  #xOf(i) {
    return this.width - (this.#columns.length - i) * COLUMN;
  }

  #drawAll() {
    const { context, colours } = this;
    this.#drawn = 1;
    context.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    context.fillStyle = colours.frame;
    context.fillRect(0, 0, this.width, this.height);
    this.#drawBack(LEFT, this.width - LEFT);
    this.#drawAxes();
    this.#columns.forEach((column, i) => this.#drawColumn(column, this.#xOf(i)));
    this.#drawCursor();
  }

  #drawNew(number) {
    const { context, scale } = this;
    if (this.#cursor !== null) return this.#drawAll();
    const shift = number * COLUMN;
    const start = this.width - this.capacity * COLUMN;
    const from = start + shift;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.drawImage(
      this.canvas, from * scale, 0, (this.width - from) * scale, this.height * scale,
      start * scale, 0, (this.width - from) * scale, this.height * scale,
    );
    context.setTransform(scale, 0, 0, scale, 0, 0);
    this.#drawBack(this.width - shift, shift);
    for (let i = this.#columns.length - number; i < this.#columns.length; i++) this.#drawColumn(this.#columns[i], this.#xOf(i));
  }

  /** Frame and grid behind the columns. */
  #drawBack(x, width) {
    const { context, colours } = this;
    context.fillStyle = colours.frame;
    context.fillRect(x, 0, width, this.height);
    const floor = 8 + this.#plotHeight;
    context.fillStyle = colours.grid;
    for (const tokens of this.#gridTokens()) context.fillRect(x, Math.round(floor - this.#rise(tokens)), width, 1);
    context.fillStyle = colours.line;
    context.fillRect(x, 7, width, 1); // the budget
    context.fillRect(x, floor, width, 1);
    context.fillRect(x, floor + GAP, width, 1); // all blocks
    context.fillRect(x, this.height - 1, width, 1);
  }

  #gridTokens() {
    const tokens = [];
    for (let some = 4; some < this.budget * 0.7; some *= 4) tokens.push(some);
    return tokens;
  }

  #drawAxes() {
    const { context, colours } = this;
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillStyle = colours.hint;
    const floor = 8 + this.#plotHeight;
    for (const tokens of this.#gridTokens()) context.fillText(String(tokens), LEFT - 5, floor - this.#rise(tokens));
    context.fillStyle = colours.text;
    context.fillText(short(this.budget), LEFT - 5, 9);
    context.fillText(short(this.blocks), LEFT - 5, floor + GAP + 5);
    context.fillStyle = colours.hint;
    context.fillText("blocks", LEFT - 1, this.height - 8);
  }

  #drawColumn(column, x) {
    if (x < LEFT) return;
    const { context, colours } = this;
    const floor = 8 + this.#plotHeight;
    const width = COLUMN - 1;
    if (column.mark) {
      context.fillStyle = colours.line;
      const dash = column.mark === "idle" ? 2 : 7;
      for (let y = 10; y < floor; y += 2 * dash) context.fillRect(x + COLUMN / 2 - 1, y, 2, dash);
      return;
    }
    const { step } = column;
    let tokens = 0;
    for (const run of step.runs) {
      const bottom = floor - this.#rise(tokens);
      const middle = floor - this.#rise(tokens + run.again);
      tokens += run.tokens;
      const top = floor - this.#rise(tokens);
      const colour = run.kind === Kind.OTHERS ? colours.others : colours.runs[run.id % 8];
      const seam = bottom - top > 3 ? 1 : 0; // between two runs
      context.fillStyle = run.kind === Kind.DECODE || run.kind === Kind.OTHERS ? colour : this.#patterns.get(context, colour, false);
      context.fillRect(x, top + seam, width, bottom - top - seam);
      if (run.again) {
        context.fillStyle = colours.frame;
        context.fillRect(x, middle, width, bottom - middle);
        context.fillStyle = this.#patterns.get(context, colour, true);
        context.fillRect(x, middle, width, bottom - middle);
      }
      if (run.kind === Kind.LAST_CHUNK) {
        context.fillStyle = colour;
        context.fillRect(x, top + seam, width, Math.min(3, bottom - top));
      }
      if (this.isOwn(run.id) && bottom - top > 2) {
        context.strokeStyle = colours.text;
        context.lineWidth = 1.5;
        context.strokeRect(x + 0.75, top + seam + 0.75, width - 1.5, bottom - top - seam - 1.5);
      }
      if (bottom - top > 7 && this.isMoved(run.id)) {
        context.fillStyle = colours.text;
        context.beginPath();
        context.moveTo(x + 1, top + seam);
        context.lineTo(x + width - 1, top + seam);
        context.lineTo(x + width / 2, top + seam + Math.min(4, bottom - top - seam));
        context.fill();
      }
    }
    if (step.preempted) {
      context.fillStyle = colours.text;
      context.fillRect(x, 1, width, 5); // above the frame: somebody lost its place
    }
    const height = (BLOCKS_HEIGHT - 9) * Math.min(1, step.blocks / this.blocks);
    context.fillStyle = colours.blocks;
    context.fillRect(x, this.height - 1 - height, width, height);
  }

  // ---- reading one column ----

  #drawCursor() {
    if (this.#cursor === null || !this.#columns[this.#cursor]) return;
    const { context, colours } = this;
    context.strokeStyle = colours.text;
    context.lineWidth = 2;
    context.strokeRect(this.#xOf(this.#cursor) - 1, 7, COLUMN + 1, this.height - 8);
  }

  /** Words for the column at `x` CSS pixels from the left; null: none there. */
  inspectAt(x) {
    const i = this.#columns.length - Math.ceil((this.width - x) / COLUMN);
    return this.#inspect(this.#columns[i] ? i : null);
  }

  /** Words for the column `by` further right. */
  inspectNext(by) {
    const i = (this.#cursor ?? this.#columns.length - (by > 0 ? 1 : 0)) + by;
    return this.#inspect(this.#columns.length ? Math.min(Math.max(i, 0), this.#columns.length - 1) : null);
  }

  leave() {
    return this.#inspect(null);
  }

  #inspect(i) {
    if (i !== this.#cursor) {
      this.#cursor = i;
      this.#drawn = 0;
    }
    const column = this.#columns[i];
    return column ? column.words ?? wordsOf(column.step, this.budget) : null;
  }
}

const short = (number) => (number >= 10000 ? `${Math.round(number / 1000)}k` : String(number));
