// One request twice on one seed: with drafts, and by plain decoding.

import { AnswerView, drawAnswerCounters } from "./answer.js";
import { complete } from "./api.js";
import { announce, by, el, setText } from "./dom.js";
import { AnswerRecord, difference, ms, tokens } from "./origin.js";

/** Two times whose ratio is closer to 1 than this are called equal. */
const EQUAL = 0.02;

let model = "";
let running = null;

export function setCompareModel(name) {
  model = name;
}

function bodyOf(draft, seed) {
  return {
    model,
    messages: [{ role: "user", content: by("compare-prompt").value }],
    stream: true,
    temperature: Number(by("compare-temperature").value || 0),
    max_completion_tokens: Number(by("compare-tokens").value || 96),
    seed,
    wisp: { trace: true, draft },
  };
}

async function ask(side, draft, seed, signal) {
  const place = by(`${side}-answer`);
  place.replaceChildren();
  const record = new AnswerRecord(performance.now());
  const view = new AnswerView(place, record);
  view.onDraw = () => drawAnswerCounters(by(`${side}-counters`), record);
  view.changed(0);
  try {
    await complete(bodyOf(draft, seed), {}, signal, (chunk) => view.changed(record.add(chunk, performance.now())));
  } catch (error) {
    if (error.name !== "AbortError") {
      place.append(el("p", { className: "problem", role: "alert" }, error.text || `The page failed: ${error.message}`));
    }
    throw error;
  } finally {
    view.changed(0);
  }
  return record;
}

/** Name a gain or a loss, and its look. ratio: time per token of plain decoding to that with drafts. */
function speedup(ratio) {
  if (Math.abs(ratio - 1) < EQUAL) return ["about as fast", ""];
  return ratio > 1 ? [`${ratio.toFixed(2)} times as fast`, "good"] : [`${(1 / ratio).toFixed(2)} times as slow`, "bad"];
}

function verdict(drafted, plain) {
  const found = difference(drafted, plain);
  const place = by("verdict");
  if (found) {
    place.className = "verdict bad";
    setText(place, `Not identical: ${found}.`);
  } else {
    const [fast, slow] = [drafted.counters(0), plain.counters(0)];
    place.className = "verdict";
    place.replaceChildren(el("span", { className: "good" }, `Identical: the same ${tokens(drafted.count)}.`));
    if (fast.tpotMs !== null && slow.tpotMs !== null) {
      const [speed, look] = speedup(slow.tpotMs / fast.tpotMs);
      // The time to the first token does not count: the first request computes the prompt, the second has it cached.
      place.append(
        ` After the first token, with drafts ${ms(fast.tpotMs)} per token, plain decoding ${ms(slow.tpotMs)}: `,
        el("span", { className: look }, `${speed} with drafts.`),
      );
    }
  }
  announce(place.textContent);
}

async function compare() {
  if (running || !by("compare-prompt").value.trim()) return;
  if (by("compare-seed").value === "") by("compare-seed").value = String(Math.floor(Math.random() * 1e9));
  const seed = Number(by("compare-seed").value);
  running = new AbortController();
  const { signal } = running;
  by("compare-run").hidden = true;
  by("compare-stop").hidden = false;
  by("compare-stop").focus();
  by("without-answer").replaceChildren();
  by("without-counters").replaceChildren();
  by("verdict").className = "verdict";
  const together = by("compare-together").checked;
  setText(by("verdict"), together ? "Both requests are running at once …" : "One after the other, so that each has the machine to itself …");
  try {
    const first = ask("with", "auto", seed, signal);
    if (!together) await first;
    const [drafted, plain] = await Promise.all([first, ask("without", "none", seed, signal)]);
    verdict(drafted, plain);
  } catch (error) {
    running.abort();
    setText(by("verdict"), error.name === "AbortError" ? "Stopped." : "Not compared: a request failed.");
    by("verdict").className = "verdict bad";
  } finally {
    running = null;
    by("compare-run").hidden = false;
    by("compare-stop").hidden = true;
    by("compare-run").focus();
  }
}

export function startCompare() {
  by("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    compare();
  });
  by("compare-stop").addEventListener("click", () => running && running.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) running.abort();
  });
}
