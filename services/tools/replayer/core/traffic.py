"""Recorded traffic: requests, drafts, heartbeats and cost models, as input for a run under another policy.

A session's text is known before the run, since it does not depend on the policy. The starts of its rounds do: a round
that starts where none was recorded gets the draft of the last recorded round before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from services.tools.replayer.core.recording import JournalEntry, Recording
from services.tools.replayer.core.sessions import RecordedJob, RecordedRound, RecordedSession, SessionReader
from shared import cost
from shared.messages import Batch, CostModel, Generate, Heartbeat, Status

DEFAULT_HOP_MS = 2.0


@dataclass(frozen=True)
class RecordedDraft:
    """The draft of a recorded round, without its tokens."""

    base_len: int
    acceptance: list[float]
    """Predicted acceptance of each token."""
    right: int
    """Number of its first tokens that agree with the text."""
    draft_ms: float
    away_ms: float
    """Time from the previous result (in the first round: the request) to the scheduler, drafting included."""
    drafter_id: str
    run_tokens: int = 0
    """Tokens that its drafter left to a run of the verifier after it."""
    run_copies: int = 0
    """Most tokens that a step of that run may copy."""


@dataclass(frozen=True)
class RecordedRequest:
    """A recorded request with its text and its drafts."""

    generate: Generate
    start_ms: float
    """Arrival at the gateway, in milliseconds since 1970."""
    text: list[int]
    """Prompt and all committed tokens."""
    drafts: list[RecordedDraft]
    """In order of `base_len`."""
    complete: bool = True
    """True if the text came to its end; if not, the client left at this length."""
    copied: frozenset[int] = frozenset()
    """Positions of the tokens that runs copied."""
    wrong_copies: float = 0.0
    """Copies that a step of its runs verified in vain, on average."""

    def draft_at(self, base_len: int) -> RecordedDraft:
        """Return the recorded draft at this position, or the last one before it."""
        index = bisect_right(self.drafts, base_len, key=lambda draft: draft.base_len) - 1
        return self.drafts[max(0, index)]


@dataclass
class RecordedTraffic:
    """Everything that the scheduler received from outside. Times in milliseconds since 1970."""

    requests: list[RecordedRequest]
    heartbeats: list[tuple[float, Heartbeat]] = field(default_factory=list)
    cost_models: list[tuple[float, CostModel]] = field(default_factory=list)
    hop_ms: float = DEFAULT_HOP_MS
    """Time from a batch to its result without the model and without waiting behind another batch."""
    slowness: dict[str, float] = field(default_factory=dict)
    """Measured time of each verifier's batches / their time by its last cost model."""
    policy: str = ""
    """The live batch policy; empty if no batch was recorded."""
    end_ms: float = 0.0
    """The last send time."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Sessions that cannot be replayed, by reason."""


def recorded_traffic(recording: Recording) -> RecordedTraffic:
    """Return the traffic of a recording."""
    reader = SessionReader()
    traffic = RecordedTraffic([])
    policies: Counter[str] = Counter()
    for entry in recording.entries():
        reader.feed(entry)
        _feed(traffic, policies, entry)
    traffic.heartbeats.sort(key=lambda one: one[0])
    traffic.cost_models.sort(key=lambda one: one[0])
    sessions = reader.sessions.values()
    for session in sessions:
        request = _request(session, recording.redacted)
        if isinstance(request, RecordedRequest):
            traffic.requests.append(request)
        else:
            traffic.left_out[request] += 1
    traffic.requests.sort(key=lambda request: (request.start_ms, request.generate.session))
    traffic.hop_ms = _hop_ms(sessions)
    traffic.slowness = _slowness(sessions, {model.verifier: model for _, model in traffic.cost_models})
    traffic.policy = policies.most_common(1)[0][0] if policies else ""
    return traffic


def _feed(traffic: RecordedTraffic, policies: Counter[str], entry: JournalEntry) -> None:
    if entry.at_ms is None:
        return
    traffic.end_ms = max(traffic.end_ms, entry.at_ms)
    match entry.message:
        case Heartbeat() as heartbeat:
            traffic.heartbeats.append((entry.at_ms, heartbeat))
        case CostModel() as model:
            traffic.cost_models.append((entry.at_ms, model))
        case Batch() as batch:
            policies[batch.policy] += 1
        case _:
            pass


def _request(session: RecordedSession, redacted: bool) -> RecordedRequest | str:
    """Return the session's request, or the reason why it cannot be replayed."""
    if session.ended is not None and session.ended.reason == "refused":
        return "they were refused"
    generate, start_ms = session.generate, session.start_ms
    if generate is None or start_ms is None:
        return "their beginning is not in the recording"
    if session.ended is None and session.finish is None:
        return "their end is not in the recording"
    text = list(generate.prompt)
    output = session.output()
    while len(text) in output:
        text.append(output[len(text)])
    if len(text) != len(generate.prompt) + len(output):
        return "a part of their text is not in the recording"
    drafts = _drafts(session, start_ms, text, redacted)
    if len(text) == len(generate.prompt) or not drafts:
        return "they got no token"
    reports = [report for run in session.runs for report in run.reports if report.status is Status.COMMITTED]
    copied = frozenset(report.base_len + index for report in reports for index in report.copied)
    wrong = sum(report.trimmed_to - len(report.copied) for report in reports)
    steps = sum(report.run_steps for report in reports)
    return RecordedRequest(generate, start_ms, text, drafts, session.complete, copied, wrong / max(1, steps))


def _drafts(session: RecordedSession, start_ms: float, text: list[int], redacted: bool) -> list[RecordedDraft]:
    drafts = []
    since_ms: float | None = start_ms
    runs = {run.after: run for run in session.runs if run.reports}
    for number in sorted(session.rounds):
        round_ = session.rounds[number]
        arrived_ms = _arrived_ms(round_)
        if since_ms is not None and arrived_ms is not None:
            away_ms = max(0.0, arrived_ms - since_ms)
            verify = round_.verify
            acceptance = verify.acceptance[: len(verify.draft)]
            drafts.append(
                RecordedDraft(
                    verify.base_len,
                    acceptance + [0.5] * (len(verify.draft) - len(acceptance)),
                    _right(round_, text, redacted),
                    min(verify.draft_ms, away_ms),
                    away_ms,
                    verify.drafter,
                    verify.run_tokens,
                    verify.run_copies,
                )
            )
        run = runs.get(number)
        since_ms = round_.result_ms if run is None else run.sent_ms[-1]
    return sorted(drafts, key=lambda draft: draft.base_len)


def _arrived_ms(round_: RecordedRound) -> float | None:
    """Return the arrival of a round at the scheduler."""
    if round_.jobs and round_.jobs[0].at_ms is not None:
        return round_.jobs[0].at_ms - round_.jobs[0].job.queue_ms
    return round_.sent_ms[0]


def _right(round_: RecordedRound, text: list[int], redacted: bool) -> int:
    """Return how many of a draft's first tokens agree with the text."""
    if redacted:
        # Only verified tokens can be judged without their ids; trimmed ones count as wrong.
        result = round_.result
        return result.accepted if result is not None and result.status is Status.COMMITTED else 0
    right = 0
    for drafted, committed in zip(round_.verify.draft, text[round_.verify.base_len :], strict=False):
        if drafted != committed:
            break
        right += 1
    return right


def _slowness(sessions: Iterable[RecordedSession], models: Mapping[str, CostModel]) -> dict[str, float]:
    """Return each verifier's measured time / its predicted time, over the batches that were recorded as a whole."""
    batches: dict[str, list[RecordedJob]] = {}
    for session in sessions:
        for round_ in session.rounds.values():
            for job in round_.jobs:
                batches.setdefault(job.batch_id, []).append(job)
    measured_ms: defaultdict[str, float] = defaultdict(float)
    predicted_ms: defaultdict[str, float] = defaultdict(float)
    for jobs in batches.values():
        if len(jobs) != len(jobs[0].mates) + 1 or any(job.result is None for job in jobs):
            continue
        verifier_id = jobs[0].verifier_id
        shape = cost.EMPTY
        took_ms = 0.0
        for recorded in jobs:
            verify, result = recorded.job, recorded.result
            if result is not None and result.new_tokens:
                chunk = verify.prefill_to is not None
                length = verify.prefill_to if verify.prefill_to is not None else verify.base_len + len(verify.draft)
                shape = cost.grow(shape, result.new_tokens, length, 0 if chunk else len(verify.draft) + 1)
                took_ms = max(took_ms, result.verify_ms)
        measured_ms[verifier_id] += took_ms
        predicted_ms[verifier_id] += cost.predict_ms(models.get(verifier_id, cost.FALLBACK), shape)
    return {name: measured_ms[name] / ms for name, ms in predicted_ms.items() if ms and measured_ms[name]}


def _hop_ms(sessions: Iterable[RecordedSession]) -> float:
    found = []
    for session in sessions:
        for round_ in session.rounds.values():
            for job in round_.jobs:
                if job.result is not None and job.result_ms is not None and job.at_ms is not None:
                    begun_ms = max(job.at_ms, job.free_ms or 0.0)
                    found.append(max(0.0, job.result_ms - begun_ms - job.result.verify_ms))
    return median(found) if found else DEFAULT_HOP_MS
