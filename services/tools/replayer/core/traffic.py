"""What came from outside in a recording, to be fed to other policies: requests, drafts, verifiers. Pure.

A session's text does not depend on the policy, so it is known beforehand. Where its rounds begin does depend on it: a
round at a place where none was recorded gets the draft of the recorded round next to it, right as far as that one was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from services.tools.replayer.core.recording import Recording
from services.tools.replayer.core.sessions import Life, Lives, Round, Sent
from shared import cost
from shared.messages import Batch, CostModel, Generate, Heartbeat, Status

DEFAULT_HOP_MS = 2.0


@dataclass(frozen=True)
class Draft:
    """The draft of a recorded round, without its tokens."""

    base_len: int
    acceptance: list[float]
    """As it was predicted, for each token."""
    right: int
    """Tokens of it that agree with the text, before the first that does not."""
    draft_ms: float
    away_ms: float
    """From the result before (the first round: from the request) to its arrival at the scheduler, drafting included."""
    drafter: str


@dataclass(frozen=True)
class Visit:
    """A request, and all that is known of its text and its drafts."""

    generate: Generate
    start_ms: float
    """When it came: milliseconds since 1970."""
    text: list[int]
    """Prompt and everything that was committed."""
    drafts: list[Draft]
    """By `base_len`."""
    whole: bool = True
    """Whether the text came to its own end; if not, its client left there."""

    def draft_at(self, base_len: int) -> Draft:
        """The recorded draft at this place, or the one before it."""
        index = bisect_right(self.drafts, base_len, key=lambda draft: draft.base_len) - 1
        return self.drafts[max(0, index)]


@dataclass
class Arrivals:
    """Everything that came from outside."""

    visits: list[Visit]
    heartbeats: list[tuple[float, Heartbeat]] = field(default_factory=list)
    """With their times in milliseconds since 1970, as all here."""
    cost_models: list[tuple[float, CostModel]] = field(default_factory=list)
    hop_ms: float = DEFAULT_HOP_MS
    """What passes between sending a batch and its result beside the model, and the wait for another batch."""
    slowness: dict[str, float] = field(default_factory=dict)
    """Of each verifier: measured time of its batches / their time by its last cost model."""
    policy: str = ""
    """The policy that was live."""
    end_ms: float = 0.0
    """When the recording ends."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Sessions that cannot be replayed, by reason."""


def arrivals(recording: Recording) -> Arrivals:
    """What came from outside in a recording."""
    lives = Lives()
    found = Arrivals([])
    policies: Counter[str] = Counter()
    for entry in recording.entries():
        lives.feed(entry)
        if entry.at_ms is None:
            continue
        found.end_ms = max(found.end_ms, entry.at_ms)
        match entry.message:
            case Heartbeat() as heartbeat:
                found.heartbeats.append((entry.at_ms, heartbeat))
            case CostModel() as model:
                found.cost_models.append((entry.at_ms, model))
            case Batch() as batch:
                policies[batch.policy] += 1
            case _:
                pass
    found.heartbeats.sort(key=lambda one: one[0])
    found.cost_models.sort(key=lambda one: one[0])
    for life in lives.of.values():
        visit = _visit(life, recording.redacted)
        if isinstance(visit, Visit):
            found.visits.append(visit)
        else:
            found.left_out[visit] += 1
    found.visits.sort(key=lambda visit: (visit.start_ms, visit.generate.session))
    found.hop_ms = _hop_ms(lives.of.values())
    found.slowness = _slowness(lives.of.values(), {model.verifier: model for _, model in found.cost_models})
    found.policy = policies.most_common(1)[0][0] if policies else ""
    return found


def _visit(life: Life, redacted: bool) -> Visit | str:
    """The session; or why it cannot be replayed."""
    if life.ended is not None and life.ended.reason == "refused":
        return "they were refused"
    generate, start_ms = life.generate, life.start_ms
    if generate is None or start_ms is None:
        return "their beginning is not in the recording"
    if life.ended is None and life.finish is None:
        return "their end is not in the recording"
    text = list(generate.prompt)
    output = life.output()
    while len(text) in output:
        text.append(output[len(text)])
    if len(text) != len(generate.prompt) + len(output):
        return "a part of their text is not in the recording"
    drafts = []
    since_ms: float | None = start_ms
    for number in sorted(life.rounds):
        one = life.rounds[number]
        arrived_ms = _arrived_ms(one)
        if since_ms is not None and arrived_ms is not None:
            away_ms = max(0.0, arrived_ms - since_ms)
            verify = one.verify
            acceptance = verify.acceptance[: len(verify.draft)]
            drafts.append(
                Draft(
                    verify.base_len,
                    acceptance + [0.5] * (len(verify.draft) - len(acceptance)),
                    _right(one, text, redacted),
                    min(verify.draft_ms, away_ms),
                    away_ms,
                    verify.drafter,
                )
            )
        since_ms = one.result_ms
    if len(text) == len(generate.prompt) or not drafts:
        return "they got no token"
    drafts.sort(key=lambda draft: draft.base_len)
    return Visit(generate, start_ms, text, drafts, life.whole)


def _arrived_ms(one: Round) -> float | None:
    """When the scheduler had the round."""
    if one.jobs and one.jobs[0].at_ms is not None:
        return one.jobs[0].at_ms - one.jobs[0].job.queue_ms
    return one.sent_ms[0]


def _right(one: Round, text: list[int], redacted: bool) -> int:
    if redacted:
        # Whether trimmed tokens were right cannot be seen then; they count as wrong.
        return one.result.accepted if one.result is not None and one.result.status is Status.COMMITTED else 0
    right = 0
    for drafted, committed in zip(one.verify.draft, text[one.verify.base_len :], strict=False):
        if drafted != committed:
            break
        right += 1
    return right


def _slowness(lives: Iterable[Life], models: Mapping[str, CostModel]) -> dict[str, float]:
    batches: dict[str, list[Sent]] = {}
    for life in lives:
        for one in life.rounds.values():
            for sent in one.jobs:
                batches.setdefault(sent.batch, []).append(sent)
    measured_ms: defaultdict[str, float] = defaultdict(float)
    predicted_ms: defaultdict[str, float] = defaultdict(float)
    for jobs in batches.values():
        name, model = jobs[0].verifier, models.get(jobs[0].verifier, cost.FALLBACK)
        if len(jobs) != len(jobs[0].mates) + 1 or any(sent.result is None for sent in jobs):
            continue
        shape = cost.EMPTY
        took_ms = 0.0
        for sent in jobs:
            job, result = sent.job, sent.result
            if result is not None and result.new_tokens:
                chunk = job.prefill_to is not None
                length = job.prefill_to if job.prefill_to is not None else job.base_len + len(job.draft)
                shape = cost.grow(shape, result.new_tokens, length, 0 if chunk else len(job.draft) + 1)
                took_ms = max(took_ms, result.verify_ms)
        measured_ms[name] += took_ms
        predicted_ms[name] += cost.predict_ms(model, shape)
    return {name: measured_ms[name] / ms for name, ms in predicted_ms.items() if ms and measured_ms[name]}


def _hop_ms(lives: Iterable[Life]) -> float:
    found = []
    for life in lives:
        for one in life.rounds.values():
            for sent in one.jobs:
                if sent.result is not None and sent.result_ms is not None and sent.at_ms is not None:
                    begun_ms = max(sent.at_ms, sent.free_ms or 0.0)
                    found.append(max(0.0, sent.result_ms - begun_ms - sent.result.verify_ms))
    return median(found) if found else DEFAULT_HOP_MS
