// The origin of each token of an answer, from the trace that the gateway adds to the stream.

export const ORIGINS = {
  lookup: "accepted draft, from prompt lookup",
  hidden: "accepted draft, from hidden states",
  model: "accepted draft, from a draft model",
  draft: "accepted draft",
  bonus: "the target's own, after a wholly accepted draft",
  own: "the target's own",
  run: "the target's own, in a run",
  copy: "a copy of earlier text, made by the verifier in a run; copies are not counted as drafts",
};

/** The same, for a legend with one line each. */
export const LEGEND = {
  lookup: "accepted draft: prompt lookup",
  hidden: "accepted draft: hidden states",
  model: "accepted draft: draft model",
  draft: "accepted draft: other source",
  own: "the target's own",
  bonus: "its own, after a whole draft",
  run: "its own, in a run",
  copy: "copy of earlier text, in a run",
};

export const SHORT = {
  lookup: "lookup",
  hidden: "hidden states",
  model: "draft model",
  draft: "draft",
  bonus: "bonus",
  own: "target's own",
  run: "run",
  copy: "copied in a run",
};

/** An answer as it arrives: its tokens with their rounds, and the counters. */
export class AnswerRecord {
  constructor(startedMs) {
    this.startedMs = startedMs;
    this.tokens = [];
    this.rounds = [];
    this.text = "";
    this.finish = "";
    this.summary = null;
    this.firstMs = null;
    this.lastMs = null;
    this.resolved = 0;
    this.openRound = 0;
  }

  /** Add a chunk of the stream. Returns the index of the first token whose data changed. */
  add(chunk, nowMs) {
    const trace = chunk.wisp || {};
    const from = Math.min(this.resolved, this.tokens.length);
    const choice = (chunk.choices || [])[0];
    const text = choice ? (choice.delta && choice.delta.content) || choice.text || "" : "";
    this.text += text;
    const made = trace.tokens || [];
    const logprobs = (choice && choice.logprobs && choice.logprobs.content) || [];
    made.forEach((token, i) => {
      const found = logprobs[i];
      this.tokens.push({
        index: this.tokens.length,
        id: token.id,
        text: token.text,
        draft: token.draft,
        logprob: found ? found.logprob : null,
        round: null,
        origin: token.draft ? "draft" : "own",
      });
    });
    // Text that no token covers, as from a server without traces, or the rest of an unfinished character.
    const covered = made.map((token) => token.text).join("");
    if (text && text !== covered) {
      const rest = text.startsWith(covered) ? text.slice(covered.length) : covered ? "" : text;
      if (rest) this.tokens.push({ index: this.tokens.length, id: null, text: rest, draft: false, logprob: null, round: null, origin: "own" });
    }
    if (made.length || text) {
      this.firstMs = this.firstMs ?? nowMs;
      this.lastMs = nowMs;
    }
    this.rounds.push(...(trace.rounds || []));
    this.resolve();
    if (choice && choice.finish_reason) this.finish = choice.finish_reason;
    if (trace.summary) this.summary = trace.summary;
    return from;
  }

  /** Give the tokens their rounds, which come with them or after them. */
  resolve() {
    for (const round of this.rounds.slice(this.openRound)) {
      const end = Math.min(round.start + round.tokens, this.tokens.length);
      for (let i = Math.max(round.start, this.resolved); i < end; i++) {
        const token = this.tokens[i];
        if (token.round) continue;
        token.round = round;
        token.place = i - round.start;
        token.origin = originOf(token, round);
      }
    }
    while (this.resolved < this.tokens.length && this.tokens[this.resolved].round) this.resolved++;
    for (let round; (round = this.rounds[this.openRound]) && round.start + round.tokens <= this.resolved; ) this.openRound++;
  }

  get count() {
    return this.tokens.length;
  }

  /** What the counters show. Times are the gateway's once the answer is complete, and the page's before. */
  counters(nowMs) {
    const summary = this.summary;
    const drafted = this.rounds.filter((round) => !round.run);
    const verified = drafted.reduce((sum, round) => sum + round.verified, 0);
    const accepted = drafted.reduce((sum, round) => sum + round.accepted, 0);
    const rounds = drafted.length;
    const copied = this.tokens.filter((token) => token.origin === "copy").length;
    const runTokens = summary ? summary.run_tokens : this.rounds.reduce((sum, round) => sum + (round.run ? round.tokens : 0), 0);
    const ttftMs = summary ? summary.ttft_ms : this.firstMs === null ? null : this.firstMs - this.startedMs;
    const spanMs = summary ? summary.total_ms - summary.ttft_ms : this.firstMs === null ? 0 : this.lastMs - this.firstMs;
    const count = summary ? summary.tokens : this.count;
    const tpotMs = count > 1 && spanMs > 0 ? spanMs / (count - 1) : null;
    return {
      tokens: count,
      rounds,
      runTokens,
      copied,
      roundTokens: count - runTokens,
      acceptance: verified ? accepted / verified : null,
      verified,
      accepted,
      ttftMs,
      tpotMs,
      tokensPerS: tpotMs ? 1000 / tpotMs : null,
      totalMs: summary ? summary.total_ms : nowMs - this.startedMs,
      slo: summary ? summary.slo : null,
    };
  }

  /** Tokens by origin. */
  mix() {
    const counts = {};
    for (const token of this.tokens) counts[token.origin] = (counts[token.origin] || 0) + 1;
    return counts;
  }
}

/** The origin of a token: one of ORIGINS. */
export function originOf(token, round) {
  if (round.run) return token.draft ? "copy" : "run";
  const place = token.index - round.start;
  if (token.draft) {
    const source = (round.sources || [])[place];
    return source && source in ORIGINS ? source : "draft";
  }
  return place === round.accepted && round.accepted > 0 && round.accepted === round.verified ? "bonus" : "own";
}

/** What is known about a token, as lines for people. */
export function about(token) {
  const lines = [];
  const round = token.round;
  if (token.origin === "own" && round && round.verified > round.accepted) {
    lines.push("the target's own, in place of a rejected draft token");
  } else if (token.origin === "own" && round && !round.verified) {
    lines.push("the target's own, in a round without a draft");
  } else if (token.origin === "draft" && round && (round.sources || [])[token.place]) {
    lines.push(`accepted draft, from ${round.sources[token.place]}`);
  } else {
    lines.push(ORIGINS[token.origin]);
  }
  if (round) {
    const name = round.run ? "Run report" : `Round ${round.round}`;
    lines.push(`${name}, token ${token.place + 1} of ${round.tokens}; position ${token.index + 1} of the answer`);
    if (!round.run) {
      const trimmed = round.drafted - round.verified;
      lines.push(
        `${round.drafted} drafted, ${round.verified} verified, ${round.accepted} accepted` +
          (trimmed > 0 ? `, ${trimmed} trimmed by the scheduler` : ""),
      );
    }
    if (round.verifier) {
      lines.push(round.run ? `Decoded on ${round.verifier}` : `Batch ${round.batch} on ${round.verifier}`);
    }
    const spent = `${ms(round.verify_ms)} verifying`;
    lines.push(round.run ? spent : `${ms(round.draft_ms)} drafting, ${ms(round.queue_ms)} queueing, ${spent}`);
  } else {
    lines.push(`position ${token.index + 1} of the answer`);
  }
  if (token.logprob !== null && token.logprob !== undefined) {
    lines.push(`log-probability ${token.logprob.toFixed(3)} (${(100 * Math.exp(token.logprob)).toFixed(1)} %)`);
  }
  return lines;
}

export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 10000) return `${(value / 1000).toFixed(1)} s`;
  return `${value >= 100 ? Math.round(value) : value >= 10 ? value.toFixed(0) : value.toFixed(1)} ms`;
}

export function tokens(count) {
  return count === 1 ? "1 token" : `${count} tokens`;
}

/** The header x-wisp-slo in words: the promise that no verifier can keep, and the times that one can. Null gives "". */
export function unkept(header) {
  if (!header) return "";
  const words = { "least-ttft-ms": "to the first token", "least-tpot-ms": "per token" };
  const least = header.split("; ").map((part) => part.split("=")).filter(([name]) => name in words);
  const times = least.map(([name, value]) => `${value} ms ${words[name]}`).join(", ");
  return `best effort: no verifier can keep this promise${times ? ` (shortest: ${times})` : ""}`;
}

/** The first difference between two answers, for people; empty if they are the same. */
export function difference(one, other) {
  const length = Math.max(one.tokens.length, other.tokens.length);
  for (let i = 0; i < length; i++) {
    const [left, right] = [one.tokens[i], other.tokens[i]];
    if (!left || !right) return `one has ${one.tokens.length} tokens, the other ${other.tokens.length}`;
    if (left.id !== right.id) return `they differ from token ${i + 1} on: ${JSON.stringify(left.text)} and ${JSON.stringify(right.text)}`;
  }
  if (one.text !== other.text) return "the tokens are the same, the text is not";
  if (one.finish !== other.finish) return `they end differently: ${one.finish} and ${other.finish}`;
  return "";
}
