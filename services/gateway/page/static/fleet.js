// The fleet view: the state of the suite, the timeline of its batches, and the rounds of a session.

import { Problem, events, request } from "./api.js";
import { by, drawCounters, el, perFrame, setText } from "./dom.js";
import { ms, tokens } from "./origin.js";
import { Timeline } from "./timeline.js";

const LATEST = 8;
const KEPT = 3000;
const RETRY_MS = 2000;
const BEHIND_MS = 350;
/** Words of the view that need an explanation: tooltips where they stand, and a list below for phones and keyboards. */
const WORDS = {
  "Promised share": "the share of the verifiers' time that is promised to the running sessions.",
  "stands in": "no drafter serves this pool, so a scheduler does, without drafts. The text is the same, and slower.",
  "conflict": "the round was made for an older state of its text, and another one came first. Its tokens are dropped; the answer is the same.",
  "trimmed": "draft tokens that the scheduler left out of the batch, because other sessions needed the time more.",
  "run": "tokens that a verifier made by itself, without rounds, while nobody else needed it.",
  "Least slack": "the time that the most urgent session can still wait without breaking its promise. Below zero, it is late.",
};
const NO_FLEET =
  "This server is a baseline: one engine in one process, without drafters, schedulers and messages. " +
  "It has no fleet to show. Chat and Compare work as usual.";
const reduced = matchMedia("(prefers-reduced-motion: reduce)");

let timeline = null;
let wanted = false;
let stream = null;
let paused = false;
let history = [];
let state = null;
let clock = null;
let frozenMs = 0;
let chosenBatch = null;
let chosenSession = null;
let stale = false;
/** Whether the gateway receives the suite's messages. */
let connected = false;

/** The server's clock now, as far as its events tell it. */
function serverNow() {
  return clock === null ? 0 : performance.now() - clock;
}

function shownNow() {
  return paused ? frozenMs : serverNow() - BEHIND_MS;
}

function note(text, bad = false) {
  const place = by("fleet-note");
  setText(place, text);
  place.className = bad ? "note problem" : "note";
  place.hidden = !text;
}

async function look() {
  const own = new AbortController();
  stream = own;
  while (wanted && stream === own) {
    try {
      const response = await request("/fleet/events", { signal: own.signal });
      history = [];
      clock = null;
      timeline.batches = [];
      timeline.runs = [];
      for await (const event of events(response)) {
        if (stream !== own) return;
        take(event);
      }
      throw new Problem("The feed ended; the gateway may be shutting down.", { code: "feed_ended" });
    } catch (error) {
      if (error.name === "AbortError" || stream !== own) return;
      if (error.code === "no_fleet") {
        note(NO_FLEET);
        return;
      }
      note(error.text || `The page failed: ${error.message}`, true);
      if (error.status === 404) return;
      await new Promise((done) => setTimeout(done, RETRY_MS));
    }
  }
}

function take(event) {
  // The event that travelled fastest tells the server's clock best.
  const offset = performance.now() - event.now_ms;
  clock = clock === null ? offset : Math.min(clock + 0.05, offset);
  for (const item of event.news || []) {
    history.push(item);
    timeline.add(item);
  }
  if (history.length > KEPT) history.splice(0, history.length - KEPT);
  if (event.state) {
    state = event.state;
    connected = event.connected && !event.problem;
    stale = true;
    if (event.problem) note(event.problem, true);
    else if (!event.connected) note("Connecting …");
    else if (!state.verifiers.length) note("No verifier has sent a heartbeat yet.");
    else if (!timeline.batches.length && !timeline.runs.length) note("Nothing is being verified. Ask something in the chat to see it here.");
    else note("");
  }
  if (reduced.matches) drawSoon();
}

const drawSoon = perFrame(frame);

function frame() {
  if (!wanted || document.hidden) return;
  timeline.forget(shownNow());
  timeline.draw();
  if (stale && !paused) {
    stale = false;
    drawState();
  }
}

function loop() {
  if (!wanted) return;
  if (!reduced.matches) frame();
  requestAnimationFrame(loop);
}

/** Open the feed while the view is seen, and close it otherwise. */
export function showFleet(on) {
  const now = on && !document.hidden;
  if (now === wanted) return;
  wanted = now;
  if (wanted) {
    note("Connecting …");
    look();
    requestAnimationFrame(loop);
  } else if (stream) {
    stream.abort();
    stream = null;
  }
}

function percent(value) {
  return `${Math.round(100 * value)} %`;
}

function meter(value, text) {
  const bar = el("span", { className: "meter", "aria-hidden": "true" }, el("span"));
  bar.firstChild.style.width = `${Math.min(100, Math.round(100 * value))}%`;
  return [bar, text];
}

/** Draw the rows of a table, keeping those that have not changed. */
function drawRows(id, rows) {
  const body = by(id).tBodies[0];
  rows.forEach((cells, i) => {
    let row = body.rows[i];
    if (!row) body.append((row = el("tr")));
    cells.forEach((cell, column) => {
      let place = row.cells[column];
      if (!place) row.append((place = column ? el("td") : el("th", { scope: "row" })));
      const { parts, key, className = "" } = cell instanceof Object ? cell : { parts: [cell], key: cell };
      if (place.dataset.key === String(key)) return;
      place.dataset.key = String(key);
      place.dataset.label = by(id).tHead.rows[0].cells[column].textContent;
      place.className = className;
      place.replaceChildren(...(typeof parts === "function" ? parts() : parts));
    });
    row.className = rows[i].mark || "";
  });
  while (body.rows.length > rows.length) body.lastElementChild.remove();
}

const right = (text) => ({ parts: [text], key: text, className: "number" });
const gauge = (value, text) => ({ parts: () => meter(value, text), key: text, className: "gauge" });

function drawState() {
  const acceptance = state.verified ? percent(state.accepted / state.verified) : "–";
  // The figures of a silent scheduler are out of date.
  const scheduler = state.scheduler && state.scheduler.alive ? state.scheduler : null;
  drawCounters(by("fleet-counters"), [
    ["Tokens per second", state.tokens_per_s.toFixed(1), state.run_tokens_per_s ? `${state.run_tokens_per_s.toFixed(1)} in runs` : ""],
    ["Batches per second", state.batches_per_s.toFixed(1)],
    ["Drafts accepted", acceptance, state.verified ? `${state.accepted} of ${state.verified}` : ""],
    ["Pending rounds", scheduler ? String(scheduler.pending) : "–", scheduler ? `queue ${ms(scheduler.queue_ms)}` : ""],
    ["Promised share", scheduler ? percent(scheduler.utilization) : "–", scheduler ? `policy ${scheduler.policy || "–"}` : withoutScheduler(), "", WORDS["Promised share"]],
  ]);
  drawRows("verifiers", state.verifiers.map((one) => [
    one.name,
    standing(one.alive ? (one.draining ? "draining" : "alive") : "silent"),
    gauge(one.busy, percent(one.busy)),
    gauge(one.cache_used, `${percent(one.cache_used)} of ${one.cache_tokens.toLocaleString("en")}`),
    right(String(one.sessions)),
    right(one.ratio_p50 === null ? "–" : one.ratio_p50.toFixed(2)),
  ]));
  drawRows("drafters", state.drafters.map((one) => [
    one.name, one.pool,
    standing(one.alive ? (one.drafts ? "alive" : "stands in") : "silent"),
    gauge(one.max_sessions ? one.sessions / one.max_sessions : 0, `${one.sessions} of ${one.max_sessions}`),
  ]));
  drawRows("classes", state.classes.map((one) => [
    one.name,
    right(String(one.sessions)),
    gauge(one.waiting / 20, String(one.waiting)),
    right(one.queue_ms === null ? "–" : ms(one.queue_ms)),
    { ...right(one.slack_ms === null ? "–" : `${one.slack_ms < 0 ? "−" : ""}${ms(Math.abs(one.slack_ms))}`), className: one.slack_ms < 0 ? "number bad" : "number" },
    right(one.promised ? `${one.attained} of ${one.promised}` : "–"),
    right(String(one.refused)),
  ]));
  timeline.setLanes(state.verifiers.map((one) => one.name));
  const finished = history.filter((item) => item.kind === "batch").slice(-LATEST).reverse();
  // Rows move on; those that a keyboard has reached stay until it leaves them.
  if (!by("batches").querySelector(":focus-visible")) drawRows("batches", finished.map((one) => Object.assign([
    { parts: () => [pick(shortId(one.id), `Batch ${one.id}`, () => chooseBatch(one))], key: one.id },
    one.verifier,
    right(String(one.jobs.length)),
    right(one.predicted_ms === null ? "–" : ms(one.predicted_ms)),
    right(ms(one.measured_ms)),
  ], { mark: chosenBatch && one.id === chosenBatch.id ? "chosen" : "" })));
  by("timeline").setAttribute("aria-label", `Timeline of ${timeline.batches.length} batches on ${timeline.lanes.length} verifiers in the last ten seconds; the table below lists the latest`);
  if (chosenSession) drawSession();
}

function standing(word) {
  return { parts: () => [el("span", { className: `dot ${word.replace(" ", "-")}`, "aria-hidden": "true" }), explained(word)], key: word };
}

/** Why there are no figures of a scheduler. */
function withoutScheduler() {
  if (!connected) return "not connected";
  return state.scheduler ? "the scheduler is silent" : "no scheduler has reported";
}

/** A word with its explanation as a tooltip, where it has one. */
function explained(word) {
  return WORDS[word] ? el("abbr", { title: WORDS[word] }, word) : word;
}

function shortId(id) {
  return id.length > 14 ? `…${id.slice(-12)}` : id;
}

function pick(text, label, act) {
  return el("button", { className: "pick", type: "button", "aria-label": label, onclick: act }, text);
}

function chooseBatch(batch) {
  chosenBatch = batch;
  chosenSession = null;
  timeline.chosen = batch.id;
  timeline.session = null;
  setText(by("detail-title"), `Batch ${shortId(batch.id)}`);
  const error = batch.predicted_ms ? `, ${percent(batch.measured_ms / batch.predicted_ms)} of the predicted ${ms(batch.predicted_ms)}` : "";
  const rows = batch.jobs.map((job) =>
    el("tr", {},
      el("th", { scope: "row" }, pick(job.session, `Session ${job.session}, its rounds`, () => chooseSession(job.session))),
      el("td", { className: "number" }, String(job.round)),
      el("td", {}, work(job)),
      el("td", { className: "number" }, ms(job.draft_ms)),
      el("td", { className: "number" }, ms(job.queue_ms))),
  );
  by("detail-body").replaceChildren(
    el("p", { className: "dim" }, `${batch.jobs.length} ${batch.jobs.length === 1 ? "session" : "sessions"} on ${batch.verifier}, ${ms(batch.measured_ms)}${error}`),
    table(["Session", "Round", "Work", "Drafting", "Queue"], rows),
  );
  if (state) drawState();
  by("detail").scrollIntoView({ block: "nearest" });
}

function work(job) {
  if (job.status === "prefilled") return `prompt, ${tokens(job.computed)}`;
  if (job.status !== "committed") return explained(job.status);
  if (!job.verified) return `${tokens(job.tokens)}, no draft`;
  const trimmed = job.drafted > job.verified ? `, ${job.drafted - job.verified} trimmed` : "";
  return `${job.accepted} of ${job.verified} accepted${trimmed}`;
}

function table(heads, rows) {
  for (const row of rows) [...row.cells].forEach((cell, column) => (cell.dataset.label = heads[column]));
  const made = el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, ...rows));
  made.className = "detail stack";
  return made;
}

function chooseSession(session) {
  chosenSession = session;
  timeline.session = session;
  timeline.chosen = null;
  by("detail-body").replaceChildren();
  drawSession();
  by("detail").scrollIntoView({ block: "nearest" });
}

function drawSession() {
  const found = [];
  for (const item of history) {
    if (item.kind === "run" && item.session === chosenSession) found.push({ ...item, run: true });
    for (const job of item.jobs || []) if (job.session === chosenSession) found.push({ ...job, batch: item });
  }
  setText(by("detail-title"), `Session ${chosenSession}`);
  const body = by("detail-body");
  if (body.dataset.key === `${chosenSession} ${found.length}` && body.children.length) return;
  body.dataset.key = `${chosenSession} ${found.length}`;
  const rows = found.slice(-200).reverse().map((one) =>
    el("tr", {},
      el("th", { scope: "row" }, one.run ? "run" : String(one.round)),
      el("td", {}, one.run ? `${tokens(one.tokens)} in a run` : work(one)),
      el("td", {}, one.run ? one.verifier : pick(shortId(one.batch.id), `Batch ${one.batch.id}`, () => chooseBatch(one.batch))),
      el("td", { className: "number" }, one.run ? "–" : ms(one.draft_ms)),
      el("td", { className: "number" }, one.run ? "–" : ms(one.queue_ms)),
      el("td", { className: "number" }, ms(one.run ? one.verify_ms : one.batch.measured_ms))),
  );
  const total = found.reduce((sum, one) => sum + one.tokens, 0);
  const end = found.find((one) => one.finish);
  body.replaceChildren(
    el("p", { className: "dim" }, `${found.length} rounds and reports, ${tokens(total)} since this view was opened${end ? `; it ended (${end.finish})` : ""}`),
    table(["Round", "Work", "Batch", "Drafting", "Queue", "Verifying"], rows),
  );
}

export function startFleet() {
  by("words").querySelector("dl").append(
    ...Object.entries(WORDS).flatMap(([word, meaning]) => [el("dt", {}, word), el("dd", {}, meaning)]),
  );
  timeline = new Timeline(by("timeline"));
  timeline.nowMs = shownNow;
  by("pause").addEventListener("click", () => {
    frozenMs = shownNow();
    paused = !paused;
    by("pause").setAttribute("aria-pressed", String(paused));
    setText(by("pause"), paused ? "Go on" : "Pause");
    stale = true;
  });
  by("timeline").addEventListener("click", (event) => {
    const batch = timeline.at(event.offsetX, event.offsetY);
    if (batch) chooseBatch(batch);
  });
  document.addEventListener("visibilitychange", () => showFleet(!by("view-fleet").hidden));
}
