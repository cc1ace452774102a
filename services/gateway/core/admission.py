"""Admission: whether a request is accepted, before anything of it is started.

A request without an SLO is best effort: it waits for its turn, and only the limits on running completions and on the
backlog refuse it. A request that asks for an SLO is also refused when the present load would break its SLO, or when it
would break the SLO of others. The load is the scheduler's last `Load`, together with the sessions that this gateway has
started and ended since.

A session with an SLO of one token every `tpot_ms` needs a share of the verifiers' time for itself, and steps that
follow each other within a period (`shared.slo.step_need`): those of a run where the verifiers decode in runs, else its
rounds. It adds to the promised share of the verifiers' time

    (share  +  fixed_ms / period - fixed_ms / period_ms, if period is shorter than period_ms) / verifiers

Where loading the weights hides arithmetic, a step takes most of the promised time however few sessions there are, and
its room counts instead of its time: the share is the Load's `demand`, and a session adds the tokens that it is promised

    1 / tpot_ms / room_tokens_per_ms / verifiers

SLOs of a class are promised while the sum is at most its `admit_to`. The predicted time to the first token is the
elapsed time, the queueing time, the prompt (tokens x prefill_ms) and one round. The queueing time is the backlog; with
a policy by deadlines, only the backlog of the request's own class and of classes with the same or a higher `admit_to`.

Only load refuses requests: a fleet without sessions accepts every request. An SLO that a verifier could not keep even
for this session alone counts as none, or it would be refused for ever; `unreachable` returns its times. When the
scheduler has been silent for `STALE_MS`, nothing is predicted and only the limits on sessions hold.

`retry_after_s` is the time until the reason for the refusal is expected to be gone, in whole seconds from 1 to
`LONGEST_RETRY_S`. With D, the mean duration of the recent completions of this gateway:

    too many sessions     D x (sessions that must end) / (running sessions)
    too much promised     D x (share that must become free) / (promised share)
    too long a wait       the excess of the queueing time, which is worked off in real time
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

from shared.messages import DEFAULT_CLASS, Load, Slo
from shared.slo import Promise, StepNeed, least_tpot_ms, step_need

STALE_MS = 5000.0
"""Age at which a Load is ignored."""
ARRIVED_MS = 1000.0
"""A prompt sent this long before a Load counts as part of its backlog."""
LONGEST_RETRY_S = 60
FIRST_DURATION_MS = 5000.0
"""Assumed duration of a completion before any has ended."""
SMOOTHING = 0.1


class ServiceClass(Promise):
    """The SLO that a class's requests ask for, and the load up to which they are admitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    admit_to: Annotated[float, Field(gt=0, le=10)] = 0.9
    """Promised share of the verifiers' time up to which the SLO is promised to more requests; above 1, more is promised
    than can be kept. It is also the share of the gateway's longest backlog at which any request of the class is
    refused."""
    max_sessions: Annotated[int, Field(ge=1)] | None = None
    """Most running completions of the class; None for no limit of its own."""


@dataclass(frozen=True)
class Demand:
    """A request's demand for verification."""

    service_class: str
    slo: Slo | None
    prompts: tuple[int, ...]
    """Prompt tokens of each completion."""
    elapsed_ms: float
    """Time since the request arrived."""


@dataclass(frozen=True)
class Refusal:
    """The reason why a request is refused now."""

    code: str
    """`slo_unattainable_now`, `overloaded` or `too_many_sessions`."""
    message: str
    retry_after_s: int


@dataclass(frozen=True)
class Unreachable:
    """An SLO that no verifier can keep, however idle it is. Each time is None where the SLO leaves enough of it."""

    least_ttft_ms: float | None
    """Predicted time to this request's first token without other sessions."""
    least_tpot_ms: float | None
    """Shortest time per token that can be promised."""

    def __str__(self) -> str:
        """Return the value of the response header: that the answer is best effort, and the times that can be kept."""
        times = {"least-ttft-ms": self.least_ttft_ms, "least-tpot-ms": self.least_tpot_ms}
        # Rounded up, so that an SLO of the time that is named can be kept.
        kept = [f"{name}={math.ceil(time * 10) / 10:.1f}" for name, time in times.items() if time is not None]
        return "; ".join(["best-effort", *kept])


@dataclass
class _Running:
    """A session of this gateway."""

    service_class: str
    tpot_ms: float | None
    prompt: int
    started_ms: float
    answered: bool = False
    """True if a verifier has worked on it, so that the scheduler has it."""
    shown: bool = False
    """True if a Load arrived after that."""
    prompt_shown: bool = False


class Admission:
    """Accepts or refuses requests. All `now_ms` arguments come from one monotonic clock."""

    def __init__(
        self,
        classes: Mapping[str, ServiceClass],
        max_sessions: int,
        max_backlog_ms: float = math.inf,
        predict: bool = True,
    ) -> None:
        """Without `predict`, only the limits on sessions and backlog refuse requests, with and without an SLO."""
        self._classes = classes
        self._max_sessions = max_sessions
        self._max_backlog_ms = max_backlog_ms
        self._predict = predict
        self._running: dict[str, _Running] = {}
        self._gone: list[float | None] = []
        """`tpot_ms` of the sessions in the last Load that have ended since."""
        self._duration_ms: float | None = None
        self._load: Load | None = None
        self._updated_ms = -math.inf

    def update(self, load: Load, now_ms: float) -> None:
        """Store the scheduler's load."""
        self._load, self._updated_ms = load, now_ms
        self._gone.clear()
        for running in self._running.values():
            running.shown = running.answered
            running.prompt_shown = running.answered or now_ms - running.started_ms >= ARRIVED_MS

    def start(self, session_id: str, service_class: str, slo: Slo | None, prompt: int, now_ms: float) -> None:
        """Count a started session with `prompt` prompt tokens."""
        self._running[session_id] = _Running(service_class, slo.tpot_ms if slo else None, prompt, now_ms)

    def answered(self, session_id: str) -> None:
        """Note a session's result."""
        self._running[session_id].answered = True

    def end(self, session_id: str, now_ms: float) -> None:
        """Remove an ended session."""
        ended = self._running.pop(session_id)
        if ended.shown:
            self._gone.append(ended.tpot_ms)
        if not ended.answered:
            return
        duration_ms = now_ms - ended.started_ms
        known_ms = duration_ms if self._duration_ms is None else self._duration_ms
        self._duration_ms = known_ms + SMOOTHING * (duration_ms - known_ms)

    def ask(self, demand: Demand, now_ms: float) -> Refusal | None:
        """Return the refusal of a request, None if it is accepted; of several, the one that lasts longest."""
        reasons = list(self._too_many(demand))
        if (load := self._present(now_ms)) is not None:
            reasons += self._too_long_a_backlog(demand, load)
            if self._predict and demand.slo is not None:
                reasons += self._too_much_promised(demand, demand.slo, load)
                reasons += self._too_late(demand, demand.slo, load)
        return max(reasons, key=lambda refusal: refusal.retry_after_s, default=None)

    def unreachable(self, demand: Demand, now_ms: float) -> Unreachable | None:
        """Return which times of a request's SLO no verifier can keep; None if it asks for none, or nothing predicts."""
        load, slo = self._present(now_ms), demand.slo
        if load is None or slo is None or not self._predict:
            return None
        first_ms, token_ms = _alone_ms(demand, load), _least_tpot_ms(load)
        found = Unreachable(first_ms if slo.ttft_ms < first_ms else None, token_ms if slo.tpot_ms < token_ms else None)
        return None if found == Unreachable(None, None) else found

    def _present(self, now_ms: float) -> Load | None:
        """Return the Load; None if it is old, or no verifier is usable."""
        load = self._load
        return load if load is not None and load.verifiers and now_ms - self._updated_ms <= STALE_MS else None

    def _too_many(self, demand: Demand) -> Iterator[Refusal]:
        name, count = demand.service_class, len(demand.prompts)
        of_class = sum(running.service_class == name for running in self._running.values())
        for running, limit, what in (
            (len(self._running), self._max_sessions, "completions"),
            (of_class, self._classes[name].max_sessions, f"completions of class {name!r}"),
        ):
            if limit is not None and (excess := running + count - limit) > 0:
                text = f"{running} {what} are running and {count} more would exceed the limit of {limit}"
                yield _refusal("too_many_sessions", text, self._until_freed_ms(excess, running))

    def _too_long_a_backlog(self, demand: Demand, load: Load) -> Iterator[Refusal]:
        limit_ms = self._max_backlog_ms * self._classes[demand.service_class].admit_to
        backlog_ms = load.backlog_ms + self._prompts_ms(load, self._running.values())
        if backlog_ms > limit_ms:
            text = (
                f"the verifiers have work for {backlog_ms / 1000:,.1f} s, and requests of class "
                f"{demand.service_class!r} wait at most {limit_ms / 1000:,.1f} s"
            )
            yield _refusal("overloaded", text, backlog_ms - limit_ms)

    def _too_much_promised(self, demand: Demand, slo: Slo, load: Load) -> Iterator[Refusal]:
        limit = self._classes[demand.service_class].admit_to
        unseen = [running.tpot_ms for running in self._running.values() if not running.shown]
        gone = self._gone
        shown = sum(of_class.sessions for of_class in load.classes) - len(gone)
        if shown <= 0:
            # The promised share of the Load belonged to sessions that have ended, or to past prompts.
            load, gone = load.model_copy(update={"utilization": 0.0, "demand": 0.0, "period_ms": None}), []
        own: list[float | None] = [slo.tpot_ms] * len(demand.prompts)
        before = promised(load, unseen, gone)
        after = promised(load, unseen + own, gone)
        if before > 0 and after > limit:
            text = (
                f"{before:.0%} of the verifiers' time is promised and it would be {after:.0%} with this request; "
                f"SLOs of class {demand.service_class!r} are promised up to {limit:.0%}"
            )
            yield _refusal("slo_unattainable_now", text, self._until_freed_ms(after - limit, before))

    def _too_late(self, demand: Demand, slo: Slo, load: Load) -> Iterator[Refusal]:
        alone_ms = _alone_ms(demand, load)
        first_ms = alone_ms + self._wait_ms(demand.service_class, load)
        if alone_ms <= slo.ttft_ms < first_ms:
            text = f"the first token would come after {first_ms:,.0f} ms, and the SLO is {slo.ttft_ms:,.0f} ms"
            yield _refusal("slo_unattainable_now", text, first_ms - slo.ttft_ms)

    def _wait_ms(self, service_class: str, load: Load) -> float:
        """Return the queueing time of a request of this class."""

        def goes_before(name: str) -> bool:
            return load.first_come or self._reach(name) >= self._reach(service_class)

        before = sum(one.waiting for one in load.classes if goes_before(one.service_class))
        # The request itself waits as well.
        part = (before + 1) / (sum(one.waiting for one in load.classes) + 1)
        prompts = (running for running in self._running.values() if goes_before(running.service_class))
        return load.backlog_ms * part + self._prompts_ms(load, prompts)

    def _reach(self, service_class: str) -> float:
        # Other gateways may have classes of their own.
        return self._classes.get(service_class, self._classes[DEFAULT_CLASS]).admit_to

    @staticmethod
    def _prompts_ms(load: Load, sessions: Iterable[_Running]) -> float:
        """Return the time for prompts that are too recent for the Load's backlog."""
        tokens = sum(running.prompt for running in sessions if not running.prompt_shown)
        return tokens * load.prefill_ms / load.verifiers

    def _until_freed_ms(self, excess: float, held: float) -> float:
        """Return the time until `excess` of what the running sessions hold is free, at most a completion's duration."""
        duration_ms = FIRST_DURATION_MS if self._duration_ms is None else self._duration_ms
        return duration_ms * (min(1.0, excess / held) if held else 1.0)


def promised(load: Load, started: Iterable[float | None], ended: Iterable[float | None]) -> float:
    """Return the promised share of the verifiers' time.

    It is the Load's, plus the `started` sessions that the Load lacks, minus the `ended` ones. Each is given by its
    `tpot_ms`, None for best effort.
    """
    if (room := load.room_tokens_per_ms) is not None:
        shares = [
            sum(
                1.0 / tpot_ms / room for tpot_ms in tpots_ms if tpot_ms is not None and _need(load, tpot_ms) is not None
            )
            for tpots_ms in (started, ended)
        ]
        return max(0.0, round(load.demand + (shares[0] - shares[1]) / load.verifiers, 9))
    needs = _needs(load, started)
    own = sum(need.share for need in needs) - sum(need.share for need in _needs(load, ended))
    fixed = max((load.fixed_ms / need.period_ms for need in needs), default=0.0)
    present = load.fixed_ms / load.period_ms if load.period_ms else 0.0
    # Rounded, so that ended sessions leave no remainder.
    return max(0.0, round(load.utilization + (own + max(0.0, fixed - present)) / load.verifiers, 9))


def _alone_ms(demand: Demand, load: Load) -> float:
    """Return the predicted time to the first token without other sessions."""
    tokens = max(*demand.prompts, sum(demand.prompts) / load.verifiers)
    return demand.elapsed_ms + tokens * load.prefill_ms + load.fixed_ms + load.round_ms


def _needs(load: Load, tpots_ms: Iterable[float | None]) -> list[StepNeed]:
    """Return what each session needs of a verifier, without those whose SLO a lone verifier could not keep."""
    needs = (_need(load, tpot_ms) for tpot_ms in tpots_ms if tpot_ms is not None)
    return [need for need in needs if need is not None]


def _need(load: Load, tpot_ms: float) -> StepNeed | None:
    return step_need(
        tpot_ms,
        fixed_ms=load.fixed_ms,
        round_ms=load.round_ms,
        run_ms=load.run_own_ms,
        tokens_per_round=load.tokens_per_round,
        away_ms=load.away_ms,
    )


def _least_tpot_ms(load: Load) -> float:
    return least_tpot_ms(
        fixed_ms=load.fixed_ms,
        round_ms=load.round_ms,
        run_ms=load.run_own_ms,
        tokens_per_round=load.tokens_per_round,
    )


def _refusal(code: str, text: str, wait_ms: float) -> Refusal:
    seconds = max(1, math.ceil(min(wait_ms / 1000, LONGEST_RETRY_S)))
    return Refusal(code, f"{text}; try again in {seconds} s", seconds)
