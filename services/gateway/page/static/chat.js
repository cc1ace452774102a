// The chat: messages, parameters, the request as code.

import { AnswerView, drawAnswerCounters, drawMix, spoken } from "./answer.js";
import { complete, hasKey } from "./api.js";
import { announce, by, drawCounters, el, legend, perFrame, setText, tabs } from "./dom.js";
import { AnswerRecord, LEGEND, tokens, unkept } from "./origin.js";
import { curl, pythonCode } from "./snippets.js";

const EXAMPLES = [
  "Why is the sky blue? Answer in three sentences.",
  "List the planets of the solar system, then list them again in reverse.",
  "Repeat this sentence three times: The quick brown fox jumps over the lazy dog.",
];

const conversation = by("conversation");
let model = "";
let messages = [];
let running = null;
let promised = {};
let answered = null; // the request of the answer that is shown

function number(id) {
  const text = by(id).value.trim();
  return text === "" || Number.isNaN(Number(text)) ? undefined : Number(text);
}

/** The request's headers: a promise in numbers of its own. */
function headers() {
  const found = {};
  if (by("tier").value === "own") {
    if (number("slo-ttft")) found["x-slo-ttft-ms"] = String(number("slo-ttft"));
    if (number("slo-tpot")) found["x-slo-tpot-ms"] = String(number("slo-tpot"));
  }
  return found;
}

/** The request's body with these messages. */
function body(shown) {
  const system = by("system").value.trim();
  const found = {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...shown],
    stream: true,
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_completion_tokens: number("max-tokens"),
    seed: number("seed"),
    service_tier: ["", "own"].includes(by("tier").value) ? undefined : by("tier").value,
    logprobs: by("logprobs").checked ? true : undefined,
    wisp: { trace: true, draft: by("draft").value },
  };
  return JSON.parse(JSON.stringify(found));
}

/** The promise that the request asks for, as far as the page knows it. */
function slo() {
  const tier = by("tier").value;
  if (tier === "own") return { ttft_ms: number("slo-ttft"), tpot_ms: number("slo-tpot") };
  return promised[tier] || null;
}

/** The request that a click on "Send" makes, or one of the examples. */
function nextRequest() {
  const content = by("message").value.trim() || EXAMPLES[0];
  return { body: body([...messages, { role: "user", content }]), headers: headers() };
}

const drawSnippet = perFrame(() => {
  const isPython = by("code-python").getAttribute("aria-selected") === "true";
  const make = isPython ? pythonCode : curl;
  const shown = answered || nextRequest();
  setText(by("code-title"), answered ? "The last answer's request as code" : "This request as code");
  setText(by("snippet"), make(location.origin, shown.body, shown.headers, hasKey()));
});

function isNearEnd() {
  return conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 60;
}

function scrollToEnd() {
  conversation.scrollTop = conversation.scrollHeight;
}

async function send(text) {
  if (running || !text.trim()) return;
  by("welcome").hidden = true;
  const own = messages; // "Clear" begins another list
  const tier = by("tier").value;
  const asked = { role: "user", content: text };
  const answer = el("div", { className: "answer" });
  const problem = el("p", { className: "problem", role: "alert", hidden: true });
  const status = el("p", { className: "dim status" }, "waiting for the first token …");
  conversation.append(
    el("article", { className: "said" }, el("h3", { className: "unseen" }, "You"), el("p", {}, text)),
    el("article", { className: "made" }, el("h3", { className: "unseen" }, "Answer"), answer, status, problem),
  );
  scrollToEnd();
  const sent = { body: body([...own, asked]), headers: headers() };
  const before = answered;
  answered = sent;
  drawSnippet();
  const record = new AnswerRecord(performance.now());
  const view = new AnswerView(answer, record);
  const limits = slo();
  const drawAll = () => {
    const follow = isNearEnd();
    drawAnswerCounters(by("counters"), record, limits);
    drawMix(by("mix"), by("mix-legend"), record);
    if (follow) scrollToEnd();
  };
  view.onDraw = drawAll;
  running = new AbortController();
  busy(true);
  announce("Sent. The answer is coming.");
  try {
    const response = await complete(sent.body, sent.headers, running.signal, (chunk) => {
      const from = record.add(chunk, performance.now());
      view.changed(from);
      if (record.count) setText(status, "");
    });
    const seed = response.headers.get("x-wisp-seed");
    if (record.summary && record.summary.slo) promised[tier] = record.summary.slo;
    view.drawNow(); // the answer is whole when its status says so
    setText(status, [ended(record), seed ? `seed ${seed}` : "", unkept(response.headers.get("x-wisp-slo"))].filter(Boolean).join(" · "));
    announce(spoken(record));
  } catch (error) {
    if (error.name === "AbortError") {
      setText(status, "stopped");
      if (messages === own) announce("Stopped.");
    } else {
      setText(status, "");
      setText(problem, error.text || `The page failed: ${error.message}`);
      problem.hidden = false;
    }
  } finally {
    running = null;
    busy(false);
    view.changed(0);
    if (!record.count || messages !== own) view.onDraw = resetCounters;
  }
  if (messages !== own) return;
  if (record.text) {
    own.push(asked, { role: "assistant", content: record.text });
  } else {
    answered = before;
    // Nothing was answered: the question goes back into the field, so that it can be sent again.
    if (!by("message").value) by("message").value = text;
  }
  drawSnippet();
}

function ended(record) {
  if (record.finish === "length") return "cut at the token limit";
  const summary = record.summary;
  return summary ? `${tokens(summary.tokens)} in ${(summary.total_ms / 1000).toFixed(2)} s` : "complete";
}

function busy(on) {
  // The focus follows the button that it was on; elsewhere it stays.
  const moves = [by("send"), by("stop"), by("message"), document.body].includes(document.activeElement);
  by("send").hidden = on;
  by("stop").hidden = !on;
  conversation.setAttribute("aria-busy", String(on));
  if (moves) (on ? by("stop") : by("message")).focus();
}

function clear() {
  if (running) running.abort();
  messages = [];
  answered = null;
  for (const part of conversation.querySelectorAll("article")) part.remove();
  by("welcome").hidden = false;
  resetCounters();
  announce("Conversation cleared.");
  by("message").focus();
  drawSnippet();
}

function resetCounters() {
  drawCounters(by("counters"), [["Tokens per second", "–"], ["Drafts accepted", "–"], ["First token", "–"], ["Per token", "–"], ["Rounds", "–"], ["Whole answer", "–"]]);
  by("mix").replaceChildren();
  by("mix").setAttribute("aria-label", "No tokens yet");
  by("mix-legend").replaceChildren();
}

function stopChat() {
  if (running) running.abort();
}

export function setModel(name) {
  model = name;
  drawSnippet();
}

/** Offer log-probabilities. */
export function offerLogprobs() {
  by("logprobs-row").hidden = false;
}

export function startChat() {
  legend(by("legend"), Object.keys(LEGEND), LEGEND);
  by("examples").append(
    ...EXAMPLES.map((text) => el("button", { type: "button", className: "example", onclick: () => send(text) }, text)),
  );
  by("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = by("message").value;
    if (running || !text.trim()) return;
    by("message").value = "";
    send(text);
  });
  by("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      by("composer").requestSubmit();
    }
  });
  by("message").addEventListener("input", drawSnippet);
  by("options").addEventListener("input", () => {
    for (const one of document.querySelectorAll("label.own")) one.hidden = by("tier").value !== "own";
    drawSnippet();
  });
  by("stop").addEventListener("click", stopChat);
  by("clear").addEventListener("click", clear);
  tabs(by("code").querySelector("[role=tablist]"), (tab) => {
    by("snippet").setAttribute("aria-labelledby", tab.id);
    drawSnippet();
  });
  by("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(by("snippet").textContent);
      setText(by("copy"), "Copied");
    } catch {
      getSelection().selectAllChildren(by("snippet"));
      setText(by("copy"), "Selected");
    }
    announce(by("copy").textContent);
    setTimeout(() => setText(by("copy"), "Copy"), 1500);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stopChat();
  });
  resetCounters();
  drawSnippet();
}
