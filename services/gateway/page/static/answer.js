// An answer on the page: tokens coloured by origin, the card about one of them, and the counters.

import { announce, by, drawCounters, el, legend, perFrame, setText } from "./dom.js";
import { SHORT, about, ms, tokens } from "./origin.js";

const card = by("token-card");

function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

function hideCard() {
  card.hidden = true;
}

function showCard(span, token) {
  const [first, ...rest] = about(token);
  card.replaceChildren(
    el("p", {}, el("code", {}, visible(token.text) || "(no text)"), token.id === null ? "" : ` id ${token.id}`),
    el("p", {}, el("span", { className: `t ${token.origin}`, "aria-hidden": "true" }, "ab"), ` ${first}`),
    ...rest.map((line) => el("p", { className: "dim" }, line)),
  );
  card.hidden = false;
  const place = span.getClientRects()[0] || span.getBoundingClientRect();
  const size = card.getBoundingClientRect();
  const left = Math.max(8, Math.min(place.left, innerWidth - size.width - 8));
  const below = place.bottom + 8 + size.height < innerHeight;
  card.style.left = `${left}px`;
  card.style.top = `${Math.max(8, below ? place.bottom + 8 : place.top - size.height - 8)}px`;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideCard();
});
addEventListener("scroll", hideCard, true);

/** Draws one answer into an element. Arrow keys move between its tokens. */
export class AnswerView {
  constructor(place, record) {
    this.place = place;
    this.record = record;
    this.spans = [];
    this.at = -1;
    this.from = 0;
    this.onDraw = () => {};
    this.draw = perFrame(() => this.drawNow());
    place.tabIndex = 0;
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", "Answer; arrow keys show the origin of each token");
    place.onmouseover = (event) => this.point(event);
    place.onclick = (event) => this.point(event);
    place.onmouseleave = hideCard;
    place.onblur = () => {
      hideCard();
      this.mark(-1);
    };
    place.onkeydown = (event) => this.step(event);
  }

  /** Note that tokens from this index on are new or have changed. */
  changed(from) {
    this.from = Math.min(this.from, from);
    this.draw();
  }

  drawNow() {
    const tokens = this.record.tokens;
    for (let i = this.from; i < tokens.length; i++) {
      let span = this.spans[i];
      if (!span) {
        span = el("span", {}, tokens[i].text);
        span.dataset.index = i;
        this.spans.push(span);
        this.place.append(span);
      }
      const name = `t ${tokens[i].origin}`;
      if (span.className !== name && i !== this.at) span.className = name;
    }
    this.from = tokens.length;
    this.onDraw();
  }

  point(event) {
    const span = event.target.closest("span[data-index]");
    if (!span) return hideCard();
    showCard(span, this.record.tokens[span.dataset.index]);
  }

  step(event) {
    const last = this.spans.length - 1;
    const next = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: last }[event.key];
    if (next === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.mark(Math.max(0, Math.min(last, next)));
    const token = this.record.tokens[this.at];
    this.spans[this.at].scrollIntoView({ block: "nearest" });
    // After the scrolling, whose event hides the card.
    requestAnimationFrame(() => requestAnimationFrame(() => this.at >= 0 && showCard(this.spans[this.at], token)));
    announce(`${visible(token.text)}: ${about(token).join(". ")}`);
  }

  mark(at) {
    if (this.at >= 0) this.spans[this.at].className = `t ${this.record.tokens[this.at].origin}`;
    this.at = at;
    if (at >= 0) this.spans[at].className = `t ${this.record.tokens[at].origin} current`;
  }
}

function promise(value, limit) {
  if (limit === null || limit === undefined || value === null) return ["", ""];
  return value <= limit ? [`within ${ms(limit)}`, "good"] : [`over ${ms(limit)}`, "bad"];
}

function inRuns(now) {
  return now.runTokens ? `${tokens(now.runTokens)} in runs${now.copied ? `, ${now.copied} copied` : ""}` : "";
}

/** The counters of an answer. slo: as promised, before the gateway has said it. */
export function counterRows(record, slo = null) {
  const now = record.counters(performance.now());
  const promised = now.slo || slo;
  const perToken = ["Per token", ms(now.tpotMs), ...promise(now.tpotMs, promised && promised.tpot_ms)];
  return [
    ["Tokens per second", now.tokensPerS === null ? "–" : now.tokensPerS.toFixed(1), tokens(now.tokens)],
    [
      "Drafts accepted",
      now.acceptance === null ? "–" : `${Math.round(100 * now.acceptance)} %`,
      now.verified ? `${now.accepted} of ${now.verified}` : "none verified",
    ],
    ["First token", ms(now.ttftMs), ...promise(now.ttftMs, promised && promised.ttft_ms)],
    perToken,
    ["Rounds", String(now.rounds), now.roundTokens ? `${(now.roundTokens / now.rounds).toFixed(1)} tokens each` : ""],
    ["Whole answer", ms(now.totalMs), inRuns(now)],
  ];
}

export function drawAnswerCounters(list, record, slo) {
  drawCounters(list, counterRows(record, slo));
}

/** Draw the shares of the origins as one bar with a legend. */
export function drawMix(bar, list, record) {
  const counts = record.mix();
  const origins = Object.keys(SHORT).filter((origin) => counts[origin]);
  bar.replaceChildren(
    ...origins.map((origin) => {
      const part = el("span", { className: `part ${origin}` });
      part.style.flexGrow = counts[origin];
      return part;
    }),
  );
  const words = origins.map((origin) => `${counts[origin]} ${SHORT[origin]}`).join(", ");
  if (bar.getAttribute("aria-label") !== words) bar.setAttribute("aria-label", words || "No tokens yet");
  legend(list, origins, SHORT, counts);
}

/** A sentence about a complete answer, for screen readers. */
export function spoken(record) {
  const now = record.counters(performance.now());
  const drafts = now.acceptance === null ? "no drafts" : `${Math.round(100 * now.acceptance)} percent of drafts accepted`;
  return `Answer complete: ${tokens(now.tokens)}, ${drafts}. ${record.text}`;
}
