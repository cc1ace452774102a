"""Re-execution of a recording in the arithmetic of the recording, and in another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recorded
from recorded import A, Sent

from services.tools.bench.support.tiny import tiny_model
from services.tools.cli.replay.verify import VerifyStatus, print_report
from services.tools.replayer.core.batches import recorded_batches
from services.tools.replayer.reexecute import ReexecutionReport, reexecute
from services.verifier.core.tasks import VerifyTask
from services.verifier.verify import verify
from shared.engine import Engine
from shared.messages import Sampling
from shared.models.folder import ModelFolder

ROUNDS = 3
SAMPLING = Sampling(temperature=0.5, seed=4711)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def session(model: Path, *arithmetics: str | None, wrong: int | None = None) -> list[Sent]:
    """A session of one token per round; each round names its arithmetic, None standing for this machine's.

    wrong: the round whose recorded token is another than the model's.
    """
    engine = Engine(model, budget_tokens=256)
    fingerprint = ModelFolder(model).fingerprint("bfloat16")
    generate = recorded.generate(A, sampling=SAMPLING, stop_ids=[], max_tokens=9, fingerprint=fingerprint)
    sent: list[Sent] = [(0.0, "generate.pool", generate)]
    tokens = list(generate.prompt)
    for i, arithmetic in enumerate(arithmetics):
        task = VerifyTask(A, list(tokens), [], SAMPLING, frozenset(), room=9)
        ((outcome,), _) = verify(engine, [task], digests=True)
        assert outcome.verdict is not None
        token = outcome.verdict.tokens[0] + (i == wrong)
        fields: dict[str, Any] = {"logits_digest": outcome.logits_digest if i != wrong else "0" * 16}
        fields["arithmetic"] = engine.arithmetic if arithmetic is None else arithmetic
        job = recorded.job(A, i, len(tokens), [], fingerprint=fingerprint)
        result = recorded.result(A, i, len(tokens), f"s1-{i}", [token], **fields)
        sent += [(10.0 * i + 1, "batch.v1", recorded.batch(f"s1-{i}", job)), (10.0 * i + 2, "result.d1", result)]
        tokens.append(token)
    return sent


def report_of(model: Path, sent: list[Sent]) -> ReexecutionReport:
    return reexecute(recorded_batches(recorded.recording(sent)), model)


@pytest.mark.parametrize("arithmetic", [None, ""])
def test_a_difference_in_the_same_or_an_unknown_arithmetic_is_a_fault(model: Path, arithmetic: str | None) -> None:
    same = report_of(model, session(model, *[arithmetic] * ROUNDS))
    assert (same.differences, same.unproven, same.tokens, same.digests) == ([], [], ROUNDS, ROUNDS)
    assert same.recorded_in == ([] if arithmetic == "" else [same.arithmetic])
    assert VerifyStatus.of(same) is VerifyStatus.SAME
    different = report_of(model, session(model, *[arithmetic] * ROUNDS, wrong=1))
    assert [one.position for one in different.differences] == [4]
    assert not different.unproven
    assert VerifyStatus.of(different) is VerifyStatus.DIFFERENT


def test_a_difference_in_another_arithmetic_proves_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(model, session(model, None, "elsewhere", "elsewhere", wrong=1))
    assert (report.differences, [one.position for one in report.unproven]) == ([], [4])
    assert report.recorded_in == [report.arithmetic, "elsewhere"]
    assert VerifyStatus.of(report) is VerifyStatus.UNPROVEN
    print_report(report)
    text = capsys.readouterr().out
    assert f"recorded in the arithmetic elsewhere, computed here in {report.arithmetic}:" in text
    assert "proves nothing" in text
    assert "DIFFERENT" not in text


def test_a_fault_counts_beside_differences_that_prove_nothing(model: Path) -> None:
    sent = session(model, "elsewhere", None, None, wrong=0)
    *before, (at_ms, key, last) = sent
    wrong = last.model_copy(update={"logits_digest": "0" * 16})
    report = report_of(model, [*before, (at_ms, key, wrong)])
    assert ([one.position for one in report.differences], [one.position for one in report.unproven]) == ([5], [3])
    assert VerifyStatus.of(report) is VerifyStatus.DIFFERENT


def test_logits_of_another_arithmetic_are_not_compared(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sent = session(model, *["elsewhere"] * ROUNDS)
    changed = [(at, key, _other_bits(message)) for at, key, message in sent]
    report = report_of(model, changed)
    assert (report.differences, report.unproven, report.tokens, report.digests) == ([], [], ROUNDS, 0)
    assert VerifyStatus.of(report) is VerifyStatus.SAME
    print_report(report)
    text = capsys.readouterr().out
    assert "the same tokens" in text
    assert "bit for bit" not in text


def _other_bits(message: Any) -> Any:
    return message.model_copy(update={"logits_digest": "0" * 16}) if hasattr(message, "logits_digest") else message


def several(model: Path, count: int, wrong: int | None = None) -> list[Sent]:
    """The messages of as many equal sessions. wrong: the session whose second token is another than the model's."""
    sent: list[Sent] = []
    for i in range(count):
        for at, key, message in session(model, *[None] * ROUNDS, wrong=1 if i == wrong else None):
            text = message.model_dump_json().replace(A, f"{A[:-2]}{i:02}").replace('"s1-', f'"s{i}-')
            sent.append((at, key, type(message).model_validate_json(text)))
    return sorted(sent, key=lambda one: one[0] or 0)


def test_sessions_are_computed_at_once_and_compared_one_by_one(model: Path) -> None:
    progress: list[tuple[int, int]] = []
    found = recorded_batches(recorded.recording(several(model, 5, wrong=3)))
    report = reexecute(found, model, report_progress=lambda *done: progress.append(done))
    assert [(one.session[-2:], one.position) for one in report.differences] == [("03", 4)]
    assert (report.batches, report.sessions, report.sessions_left_out) == (5 * ROUNDS - 1, 5, 0)
    assert report.tokens == 4 * ROUNDS + 2
    assert progress == [(5, 15), (10, 15), (15, 15)]


def test_without_bits_of_their_own_batches_are_computed_as_recorded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress: list[tuple[int, int]] = []
    created = Engine.__init__

    def variant(self: Engine, *values: Any, **options: Any) -> None:
        created(self, *values, **options)
        self.batch_invariant = False

    monkeypatch.setattr(Engine, "__init__", variant)
    found = recorded_batches(recorded.recording(several(model, 2)))
    report = reexecute(found, model, report_progress=lambda *done: progress.append(done))
    assert (report.differences, report.sessions, report.tokens) == ([], 2, 2 * ROUNDS)
    assert progress == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("wrong", [0, 4])
def test_only_the_latest_sessions_are_compared(model: Path, wrong: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = recorded_batches(recorded.recording(several(model, 5, wrong=wrong)))
    report = reexecute(found, model, most_sessions=2)
    assert (report.sessions, report.sessions_left_out) == (2, 3)
    assert len(report.differences) == (wrong == 4)
    print_report(report)
    assert "3 of 5 sessions were not compared" in capsys.readouterr().out


def test_a_time_limit_ends_the_comparison(model: Path) -> None:
    found = recorded_batches(recorded.recording(several(model, 2)))
    report = reexecute(found, model, time_limit_s=0.0)
    assert (report.sessions, report.sessions_left_out, report.tokens) == (0, 2, 0)
    assert VerifyStatus.of(report) is VerifyStatus.DIFFERENT, "nothing was compared"
