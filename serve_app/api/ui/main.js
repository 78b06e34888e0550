// The page: what the feed tells becomes pictures, figures and words. Knows the feed's messages (serve_app/api/live_feed.py).

import { Chat } from "./chat.js";
import { Feed, refusal } from "./feed.js";
import { Kind, Picture, nameOf, plural, readColours, readStep, wordsOf } from "./picture.js";

const $ = (id) => document.getElementById(id);
const FIGURES_MS = 500; // between two changes of figures: words are read, not watched
const TABLE_MS = 1000;
const STILL_MS = 2000; // the same of pictures, for who wants no motion
const GONE_MS = 20000; // a replica that has gone is shown for so long
const SAME_MS = 4000; // events of one kind within this time are one line
const MAX_KNOWN = 4000; // requests whose replica is remembered

const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");

const replicas = new Map(); // id -> Replica
const places = new Map(); // request -> the replica that had it last
const moved = new Set(); // requests that came from another replica
const own = new Set(); // requests of this page
let router = null;
let colours = readColours();
let key = sessionStorage.getItem("api-key") ?? "";
let isPaused = false;
let watch = null;
let lastEvent = 0;

const headers = () => (key ? { authorization: `Bearer ${key}` } : {});
const number = (value) => Math.round(value).toLocaleString("en");

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** Figures as a description list; what has not changed is left alone. */
function fill(list, pairs) {
  pairs.forEach(([name, value], i) => {
    let row = list.children[i];
    if (!row) {
      row = element("div");
      row.append(element("dt"), element("dd"));
      list.append(row);
    }
    if (row.firstChild.textContent !== name) row.firstChild.textContent = name;
    if (row.lastChild.textContent !== value) row.lastChild.textContent = value;
  });
  while (list.children.length > pairs.length) list.lastChild.remove();
}

// ---- one replica -----------------------------------------------------------------------------------------------------

class Replica {
  constructor(id) {
    this.id = id;
    this.head = null;
    this.goneAt = null;
    this.marks = []; // [ms, steps, tokens] of the last seconds, for rates
    this.root = element("article", "", "replica");
    this.title = element("h3", `Replica ${id}`);
    this.title.id = `replica-${id}`;
    this.canvas = element("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `Steps of replica ${id}.`);
    this.figures = element("dl");
    this.root.setAttribute("aria-labelledby", this.title.id);
    this.root.append(this.title, this.canvas, this.figures);
    $("replicas").append(this.root);
    this.picture = new Picture(this.canvas, colours, (request) => own.has(request), (request) => moved.has(`${request}@${id}`));
    this.canvas.addEventListener("pointermove", (event) => this.inspect(this.picture.inspectAt(event.offsetX)));
    this.canvas.addEventListener("pointerdown", (event) => this.inspect(this.picture.inspectAt(event.offsetX)));
    this.canvas.addEventListener("pointerleave", () => this.inspect(this.picture.leave()));
    this.canvas.addEventListener("blur", () => this.inspect(this.picture.leave()));
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
    new ResizeObserver(() => this.picture.resize()).observe(this.canvas);
  }

  onKey(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e6, End: 1e6 }[event.key];
    if (event.key === "Escape") this.inspect(this.picture.leave());
    else if (by) this.inspect(this.picture.inspectNext(by));
    else return;
    event.preventDefault();
  }

  inspect(words) {
    $("inspected").textContent = words ? `Replica ${this.id}, ${words}` : INSPECT_HINT;
  }

  take(told) {
    if (told.is_gone) this.goneAt = performance.now();
    const steps = told.steps.map(readStep);
    if (told.num_steps !== undefined) {
      this.head = { ...told, steps: undefined };
      this.picture.setLimits(told.token_budget, told.num_blocks);
      this.marks.push([performance.now(), told.num_steps, told.num_tokens]);
    }
    for (const step of steps) {
      if (this.picture.lastStep && step.index <= this.picture.lastStep.index) continue;
      for (const run of step.runs) this.follow(run);
    }
    this.picture.push(steps);
  }

  /** A request that runs here and ran elsewhere has been moved. */
  follow(run) {
    if (run.kind === Kind.OTHERS) return;
    const before = places.get(run.id);
    if (before === this.id) return;
    if (before !== undefined) {
      moved.add(`${run.id}@${this.id}`);
      notes.set(this.id, (notes.get(this.id) ?? new Set()).add(nameOf(run.id)));
    }
    places.set(run.id, this.id);
    if (places.size > MAX_KNOWN) places.delete(places.keys().next().value);
    if (moved.size > MAX_KNOWN) moved.delete(moved.values().next().value);
  }

  get state() {
    const known = router?.replicas[this.id];
    if (this.goneAt !== null) return "gone";
    if (known?.is_silent) return "silent";
    if (known?.is_draining) return "draining";
    return "";
  }

  show() {
    const now = performance.now();
    const { head, state } = this;
    while (this.marks.length > 1 && now - this.marks[0][0] > 3000) this.marks.shift();
    this.title.textContent = `Replica ${this.id}${state && ` · ${state}`}`;
    this.root.classList.toggle("bad", state === "gone" || state === "silent");
    this.root.classList.toggle("gone", state === "gone");
    if (!head) return;
    const known = router?.replicas[this.id];
    const [first, last] = [this.marks[0], this.marks.at(-1)];
    const seconds = (now - first[0]) / 1000;
    const rate = (i) => (seconds > 0.2 && this.marks.length > 1 ? (last[i] - first[i]) / seconds : 0);
    fill(this.figures, [
      ["run", number(head.num_running)],
      ["wait", number(head.num_waiting)],
      ["steps/s", number(rate(1))],
      ["tokens/s", number(rate(2))],
      ["blocks", `${number(head.num_used_blocks)} of ${number(head.num_blocks)}`],
      ["free budget", known ? `${number(known.num_free_blocks * known.block_size)} tokens` : "–"],
      ...(head.num_recomputed_tokens ? [["computed again", number(head.num_recomputed_tokens)]] : []),
    ]);
    const step = this.picture.lastStep;
    this.canvas.dataset.steps = this.picture.numColumns;
    this.canvas.setAttribute(
      "aria-label",
      `Steps of replica ${this.id}. ${step ? `The last one: ${wordsOf(step, head.token_budget)}` : "None yet"}.`,
    );
  }
}

const INSPECT_HINT = $("inspected").textContent;
const lines = new Map(); // what happened -> its last line in the log
const notes = new Map(); // replica -> names of requests that have just come to it

// ---- the feed --------------------------------------------------------------------------------------------------------

function take(message) {
  say("connected", "");
  router = message.router ?? router;
  for (const [id, told] of Object.entries(message.replicas)) {
    if (!replicas.has(id)) {
      if (told.is_gone) continue;
      replicas.set(id, new Replica(id));
    }
    replicas.get(id).take(told);
  }
  if (message.is_first) {
    for (const [id, replica] of replicas) if (!(id in message.replicas) && replica.goneAt === null) replica.goneAt = performance.now();
    if (message.watch !== watch) [watch, lastEvent] = [message.watch, 0]; // another ingress, or nobody looked: it counts anew
  }
  for (const event of message.events) {
    if (event.event > lastEvent) happen(event.at_ms, `${event.kind} ${event.replica}`, event.number, (count) => wordsOfEvent(event, count));
    lastEvent = Math.max(lastEvent, event.event);
  }
  for (const [id, names] of notes) {
    happen(message.at_ms, `moved ${id}`, names.size, (count) => [`${plural(count, "request")} of another replica ${count === 1 ? "goes" : "go"} on here: ${id}`, false]);
  }
  notes.clear();
}

function wordsOfEvent({ kind, replica }, count) {
  const streams = plural(count, "stream");
  const requests = plural(count, "request");
  const words = {
    replica_joined: [`Replica ${replica} is there`, false],
    replica_draining: [`Replica ${replica} drains: it ends what it has`, false],
    replica_silent: [`Replica ${replica} is silent`, true],
    replica_lost: [`Replica ${replica} is lost`, true],
    replica_left: [`Replica ${replica} has left`, false],
    streams_lost: [`${streams} lost the replica under them`, true],
    streams_resumed: [`${streams} resumed: their clients saw nothing of it`, false],
    streams_given_up: [`${streams} given up`, true],
    replica_killers: [`${requests} refused: replicas die of them`, true],
    preempted: [`${plural(count, "sequence")} preempted on ${replica}: no block was free`, false],
    refused: [`${requests} refused with 429: the queue is full, or the wait too long`, true],
    timed_out: [`${requests} waited too long in the queue`, true],
    router_away: ["The router does not answer", true],
    router_back: ["The router answers again", false],
  };
  return words[kind] ?? [kind, false];
}

/** One more line on top of the log; or more of what an earlier line says, if that is not long ago. */
function happen(atMs, what, count, words) {
  const log = $("log");
  let line = lines.get(what);
  if (!line || atMs - line.atMs > SAME_MS || !line.item.isConnected) {
    line = { atMs, count: 0, item: element("li") };
    const time = element("time", new Date(atMs).toLocaleTimeString("en-GB"));
    time.dateTime = new Date(atMs).toISOString();
    line.item.append(time, element("span"));
    log.prepend(line.item);
    lines.set(what, line);
    while (log.children.length > 80) log.lastChild.remove();
    if (lines.size > 200) lines.delete(lines.keys().next().value);
  }
  line.count += count;
  const [text, isBad] = words(line.count);
  line.item.lastChild.textContent = isBad ? `! ${text}` : text;
  line.item.lastChild.className = isBad ? "bad" : "";
}

function say(state, words) {
  const place = $("connection");
  const text = isPaused ? "Paused: nothing is asked of the server." : words || "Live";
  if (place.textContent !== text) place.textContent = text;
  place.classList.toggle("bad", state === "waiting" && !isPaused);
  if (state === "key") askForKey();
}

function askForKey() {
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
}

const feed = new Feed(headers, take, say);

// ---- figures and frames ----------------------------------------------------------------------------------------------

let figuresAt = 0;
let tableAt = 0;
let stillAt = 0;

function frame(now) {
  const isDue = !still.matches || now - stillAt > STILL_MS;
  if (isDue) {
    stillAt = now;
    for (const replica of replicas.values()) replica.picture.draw(still.matches);
  }
  if (now - figuresAt > FIGURES_MS) {
    figuresAt = now;
    showFigures();
  }
  if ($("table").open && now - tableAt > TABLE_MS) {
    tableAt = now;
    showTables();
  }
  requestAnimationFrame(frame);
}

function showFigures() {
  for (const [id, replica] of replicas) {
    if (replica.goneAt !== null && performance.now() - replica.goneAt > GONE_MS) {
      replica.root.remove();
      replicas.delete(id);
    } else replica.show();
  }
  if (!router) return;
  const state = router.is_away ? "away" : router.is_rebuilding ? "rebuilds its books" : "grants";
  $("router").classList.toggle("bad", router.is_away);
  const free = Object.values(router.replicas).reduce((sum, one) => sum + Math.max(0, one.num_free_blocks) * one.block_size, 0);
  const pairs = [["Router", state]];
  if (!router.is_away) {
    pairs.push(["queue", `${plural(router.num_queued_requests, "request")}, ${number(router.num_queued_tokens)} tokens`]);
    if (router.num_queued_requests) pairs.push(["longest wait", `${router.oldest_wait_seconds.toFixed(1)} s`]);
    pairs.push(["leases", number(router.num_leases)], ["free budget", `${number(free)} tokens`]);
    if (router.seconds_left !== null) pairs.push(["the server ends in", `${number(router.seconds_left)} s`]);
  }
  fill($("router"), pairs);
}

function showTables() {
  const kinds = ["decode", "chunk", "last chunk", "others"];
  const tables = [...replicas.values()].map((replica) => {
    const table = element("table");
    const step = replica.picture.lastStep;
    const what = step ? wordsOf(step, replica.head?.token_budget ?? 0) : "no step yet";
    table.append(element("caption", `Replica ${replica.id}: ${what}`));
    const rows = [["request", "does", "tokens", "again"], ...(step?.runs ?? []).map((run) => [
      run.kind === Kind.OTHERS ? "others" : nameOf(run.id) + (own.has(run.id) ? " (this page's)" : ""),
      kinds[run.kind], run.tokens, run.again,
    ])];
    rows.forEach((cells, i) => {
      const row = element("tr");
      for (const cell of cells) {
        const made = element(i ? "td" : "th", String(cell));
        if (!i) made.scope = "col";
        row.append(made);
      }
      table.append(row);
    });
    return table;
  });
  $("tables").replaceChildren(...tables);
}

// ---- what the user does ----------------------------------------------------------------------------------------------

function look() {
  if (isPaused || document.hidden) feed.stop();
  else feed.start();
  say("", isPaused ? "" : "Connecting …");
}

$("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  $("pause").setAttribute("aria-pressed", String(isPaused));
  look();
});
document.addEventListener("visibilitychange", look);

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("api-key", key);
  $("key-form").hidden = true;
  feed.stop();
  look();
  nameModel();
  $("prompt").focus();
});

dark.addEventListener("change", () => {
  colours = readColours();
  for (const replica of replicas.values()) replica.picture.setColours(colours);
});

async function nameModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) return askForKey();
  if (!response.ok) return say("waiting", await refusal(response));
  const names = (await response.json()).data.map((model) => model.id);
  $("model").textContent = `serves ${names[0]}`;
}

new Chat(headers, own, askForKey);
look();
nameModel().catch(() => {}); // the feed says that nobody answers
requestAnimationFrame(frame);
