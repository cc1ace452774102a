"""Runs during a rolling update: services of the version before, which know nothing of runs, beside today's.

The scheduler, the verifier's runs and the drafter's session are the live code. Messages pass through their encoding;
for a service of the version before they lose the fields that it ignores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import builders
import msgpack
import pytest

from services.drafter.core.session import DraftSession
from services.scheduler.core import runs
from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.scheduler.core.policies import PolicyOptions
from services.verifier.core.acceptance import accept
from services.verifier.core.runs import RunTable
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from shared.messages import Batch, Finish, Job, Message, Result, Sampling, Status, Verify, decode, encode

PROMPT = [1, 2, 3]
TEXT = [*PROMPT, *range(1000, 1060)]
LEASE = 3
STEP_MS = 30.0
TIMEOUT_MS = 500.0
NEW_FIELDS = {"run", "run_left", "run_tokens", "run_ms"}
"""Fields that came with runs."""

Kind = TypeVar("Kind", bound=Message)


def today(message: Kind) -> Kind:
    """The message as a service of today reads it."""
    read = decode(encode(message))
    assert isinstance(read, type(message))
    return read


def before_runs(message: Kind) -> Kind:
    """The message as a service of the version before reads it."""
    fields = _without(msgpack.unpackb(encode(message)))
    read = decode(msgpack.packb(fields))
    assert isinstance(read, type(message))
    return read


def _without(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without(one) for key, one in value.items() if key not in NEW_FIELDS}
    return [_without(one) for one in value] if isinstance(value, list) else value


@dataclass
class Suite:
    """One session, a drafter, a scheduler and a verifier. Each reads what it gets by its version."""

    drafter_reads: Callable[[Result], Result] = today
    scheduler_reads: Callable[[Verify], Verify] = today
    scheduler_reads_results: Callable[[Result], Result] = today
    verifier_reads: Callable[[Batch], Batch] = today
    run_tokens: int = 0
    now_ms: float = 0.0
    committed: list[int] = field(default_factory=lambda: list(PROMPT))
    streamed: list[int] = field(default_factory=lambda: list(PROMPT))
    """The text at the gateway, which takes tokens by position."""
    run_reports: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Dispatcher("s", SchedulingRules("wisp+", BatchLimits(400.0, 2048)))
        self.table = RunTable(digests=False)
        generate = builders.generate(prompt=PROMPT, max_tokens=len(TEXT) - len(PROMPT))
        self.drafter = DraftSession(generate, list(PROMPT))
        self._sent_ms = 0.0

    def run(self, during: Callable[[Suite], None] = lambda suite: None) -> None:
        """Play until the text is complete. during: called before each step."""
        self.scheduler.on_cost_model(builders.cost_model(), 0.0)
        self._send(0)
        for _ in range(400):
            during(self)
            self._beat()
            results = [one for _, batch in self.scheduler.dispatch(self.now_ms)[0] for one in self._verify(batch)]
            self._halt()
            results += self._step()
            self.now_ms += STEP_MS
            for result in results:
                self._deliver(result)
            if self.drafter.done:
                return
            waits = not (self.drafter.run_left or results)
            if waits and self.now_ms - self._sent_ms > TIMEOUT_MS:
                self._send(1)
        raise AssertionError(f"stuck at {len(self.committed)} of {len(TEXT)} tokens")

    def _beat(self) -> None:
        held = {"s": len(self.committed) - 1}
        self.scheduler.on_heartbeat(builders.heartbeat("v1", held, lease=LEASE), self.now_ms)

    def _send(self, attempt: int) -> None:
        """Send a round with a right and a wrong token, or one that leaves the session to the verifier."""
        known = self.drafter.tokens
        draft = [] if self.run_tokens else [*TEXT[len(known) : len(known) + 1], 7][:2]
        verify = self.drafter.verify(draft, [0.5] * len(draft), "d", 0.0, 0.0, attempt, run_tokens=self.run_tokens)
        self._sent_ms = self.now_ms
        self.scheduler.on_verify(self.scheduler_reads(verify), self.now_ms)

    def _verify(self, batch: Batch) -> list[Result]:
        results = []
        for job in self.verifier_reads(batch).jobs:
            self.rounds += 1
            if self.table.join(job) is not None or job.base_len != len(self.committed):
                tokens = self.committed[job.base_len :]
                results.append(builders.result("s", job.round, job.base_len, tokens, status=Status.CONFLICT))
                continue
            choices = TEXT[job.base_len : job.base_len + len(job.draft) + 1]
            verdict = accept(job.draft, choices, len(TEXT) - job.base_len, frozenset())
            task = VerifyTask("s", list(self.committed), job.draft, Sampling(), frozenset(), len(TEXT) - job.base_len)
            run = self.table.start(job, task, VerifyOutcome(verdict, len(job.draft), 0, 1), LEASE, self.now_ms)
            if run is not None:
                run.confirmed = True
            self.committed += verdict.tokens
            results.append(
                builders.result(
                    "s",
                    job.round,
                    job.base_len,
                    verdict.tokens,
                    batch=batch.batch,
                    accepted=verdict.accepted,
                    finish=self._finish(),
                    run_left=0 if run is None else run.left,
                )
            )
        return results

    def _halt(self) -> None:
        for sessions in self.scheduler.halts().values():
            self.table.halt(sessions)

    def _step(self) -> list[Result]:
        """Decode a token of the run, and report it when that is due."""
        for run in self.table.step(LEASE, self.now_ms):
            verdict = accept([], [TEXT[run.length]], len(TEXT) - run.length, frozenset())
            self.table.record(run, VerifyOutcome(verdict, 0, run.length, 1), STEP_MS, self.now_ms)
        results = []
        for report in self.table.due(self.now_ms, between_steps=True):
            base_len, tokens = report.commit.base_len, list(report.commit.tokens)
            assert base_len == len(self.committed)
            self.committed += tokens
            self.table.reported(report)
            self.run_reports += 1
            results.append(
                builders.result(
                    "s",
                    report.commit.round,
                    base_len,
                    tokens,
                    batch="run",
                    run=True,
                    run_left=report.left,
                    finish=self._finish(),
                    new_tokens=len(tokens),
                )
            )
        return results

    def _finish(self) -> Finish | None:
        return Finish.LENGTH if len(self.committed) == len(TEXT) else None

    def _deliver(self, result: Result) -> None:
        streamed = self.streamed[result.base_len : result.base_len + len(result.tokens)]
        assert streamed == result.tokens[: len(streamed)]
        assert result.base_len <= len(self.streamed)
        self.streamed[result.base_len :] = result.tokens
        self.scheduler.on_result(self.scheduler_reads_results(result), self.now_ms)
        known = len(self.drafter.tokens)
        if self.drafter.apply(self.drafter_reads(result)) and not self.drafter.done and not self.drafter.run_left:
            assert len(self.drafter.tokens) > known
            self._send(0)


def checked(suite: Suite) -> None:
    assert suite.committed == suite.streamed == suite.drafter.tokens == TEXT


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round is followed by a run, as that of a slow device."""
    monkeypatch.setattr(runs, "unasked_tokens", lambda *_, **__: 6)


@pytest.mark.parametrize("before", ["", "gateway", "drafter", "scheduler"])
def test_results_are_grouped_only_if_all_receivers_read_groups(before: str) -> None:
    """A service of the version before drops the field."""
    session = DraftSession(builders.generate(grouped=before != "gateway"), list(PROMPT))
    verify = today(session.verify([], [], "d", 0.0, 0.0))
    verify = verify.model_copy(update={"grouped": verify.grouped and before != "drafter"})
    fields = {"draft": 0, "prefill_to": None, "queue_ms": 0.0, "slack_ms": None, "reason": ""}
    job = Job.of(verify, **fields)  # type: ignore[arg-type]
    if before == "scheduler":
        job = Job.model_validate(job.model_dump(exclude={"grouped"}))
    assert job.grouped is (before == "")


def test_todays_services_play_runs() -> None:
    suite = Suite(run_tokens=20)
    suite.run()
    checked(suite)
    assert suite.run_reports > 5
    assert suite.rounds < 8


@pytest.mark.usefixtures("unasked")
def test_a_drafter_of_the_version_before_takes_runs_for_answers() -> None:
    suite = Suite(drafter_reads=before_runs)
    suite.run()
    checked(suite)
    assert suite.run_reports > 5


def test_a_verifier_of_the_version_before_gets_rounds_only() -> None:
    suite = Suite(verifier_reads=before_runs, run_tokens=20)
    suite.run(_expect_no_run)
    checked(suite)
    assert suite.run_reports == 0
    assert suite.rounds == len(TEXT) - len(PROMPT)


def _expect_no_run(suite: Suite) -> None:
    for verifier in suite.scheduler.fleet.verifiers.values():
        assert len(verifier.runs) == 0, "the scheduler goes by results, not by its own grants"


def test_a_scheduler_of_the_version_before_never_grants_a_run() -> None:
    """It ignores what the drafter leaves to the verifier, and reads no reports."""
    suite = Suite(scheduler_reads=before_runs, scheduler_reads_results=before_runs, run_tokens=20)
    suite.run()
    checked(suite)
    assert suite.run_reports == 0


@pytest.mark.parametrize("after_tokens", [4, 5, 9, 23])
def test_a_scheduler_of_the_version_before_takes_over_in_mid_run(after_tokens: int) -> None:
    """Nobody renews the run; its drafter goes on with rounds when it ends."""
    suite = Suite(run_tokens=20)

    def take_over(one: Suite) -> None:
        if one.scheduler_reads_results is today and len(one.committed) >= len(PROMPT) + after_tokens:
            one.scheduler_reads = one.scheduler_reads_results = before_runs
            options = PolicyOptions(without=frozenset({"runs"}))
            one.scheduler = Dispatcher("old", SchedulingRules("wisp+", BatchLimits(400.0, 2048), options=options))
            one.scheduler.on_cost_model(builders.cost_model(), one.now_ms)

    suite.run(take_over)
    checked(suite)
    assert suite.run_reports > 0


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("after_tokens", [4, 5, 9, 23])
def test_a_drafter_of_the_version_before_takes_a_session_over_in_mid_run(after_tokens: int) -> None:
    """As after a drain: it continues from the committed tokens with a round of its own."""
    suite = Suite()

    def take_over(one: Suite) -> None:
        if one.drafter_reads is today and len(one.committed) >= len(PROMPT) + after_tokens:
            one.drafter_reads = before_runs
            one.drafter = DraftSession(one.drafter.generate, list(one.committed), round=one.drafter.round + 1)
            one._send(0)

    suite.run(take_over)
    checked(suite)
