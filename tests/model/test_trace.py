"""Traces: recorded with real sources, fitted to other acceptances, and read by a twin's drafter."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from twins import make_twin
from typer.testing import CliRunner

from services.drafter.control import Controller, ControlWeights, DraftToken
from services.drafter.control.weights import UNTRAINED_MODEL
from services.drafter.core.draft import DraftRequest, States, WithoutStates
from services.drafter.drafting import load_drafting
from services.drafter.settings import DraftSettings
from services.drafter.sources import Draft, LookupDrafts
from services.tools.cli.main import app
from services.tools.training.prompts import corpus
from services.tools.training.shards import GeneratedText
from services.tools.twin.fitting import fitted, ranking
from services.tools.twin.recording import record, record_chain
from shared.errors import ModelError, SettingsError
from shared.messages import Sampling
from shared.models.folder import ModelFolder
from shared.twin.files import shipped_traces, trace_path
from shared.twin.folder import TwinFolder, write_twin
from shared.twin.trace import DEPTH, PRESENT, Trace, TraceText, load_trace, save_trace

WEIGHTS = ControlWeights(acceptance={"hidden": UNTRAINED_MODEL})
TEXTS, ANSWER, PROMPT = 40, 50, 6


class HalfRight(WithoutStates):
    """A source that knows the texts: its tokens are right with a chance that it states with an error."""

    blocking = False

    def __init__(self, texts: list[GeneratedText], acceptance: float) -> None:
        self._texts = {tuple(text.tokens[:PROMPT].tolist()): text.tokens.tolist() for text in texts}
        self._rng = np.random.default_rng(1)
        self._acceptance = acceptance

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:  # type: ignore[override]
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        tokens = []
        for ahead in range(DEPTH):
            chance = float(np.clip(self._acceptance + self._rng.uniform(-0.35, 0.35), 0.02, 0.98))
            at = len(request.tokens) + ahead
            text = self._texts[tuple(request.tokens[: request.prompt_len])]
            right = self._rng.random() < chance and at < len(text)
            tokens.append(text[at] if right else 1)
            request.round.add(DraftToken("hidden", chance, 1.0, chance / 2, 3.0))
        return Draft(tokens, {"hidden": DEPTH})

    def close(self, session_id: str) -> None:
        pass


def texts_of(count: int = TEXTS) -> list[GeneratedText]:
    rng = np.random.default_rng(0)
    return [
        GeneratedText(
            torch.from_numpy(rng.integers(10, 200, PROMPT + ANSWER).astype(np.int32)),
            torch.zeros(PROMPT + ANSWER, 4, dtype=torch.bfloat16),
            PROMPT,
            number,
            (0.0, 0.7, 1.0)[number % 3],
            ("chat", "code")[number % 2],
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A trace of random texts, of which the source knows about 70 %."""
    texts = texts_of()
    parts = tmp_path_factory.mktemp("trace") / "parts"
    return record(texts, lambda: HalfRight(texts, 0.7), WEIGHTS, {}, parts, lambda done: None)


def test_every_position_has_a_draft_of_each_source(trace: Trace) -> None:
    assert trace.texts == TEXTS
    assert len(trace.tokens) == TEXTS * ANSWER
    assert (trace.chains["hidden"].flags & PRESENT).all()
    assert trace.first_acceptance("hidden") == pytest.approx(0.7, abs=0.03)
    assert trace.facts["kinds"] == ["chat", "code"]
    assert np.unique(trace.temperature).tolist() == pytest.approx([0.0, 0.7, 1.0])
    # A wrong token ends what can be judged; the text's end too.
    judged, right = trace.judged("hidden"), trace.correct("hidden")
    assert not (judged[:, 1:] & ~right[:, :-1]).any()
    assert judged[ANSWER - 1].sum() == 1


def test_lookup_copies_what_followed_before() -> None:
    tokens = torch.tensor([9, 9, 9, 9, 9, 9, *([11, 12, 13, 14] * 5)], dtype=torch.int32)
    text = GeneratedText(tokens, torch.zeros(len(tokens), 4, dtype=torch.bfloat16), PROMPT, 0, 0.0, "chat")
    chain = record_chain(LookupDrafts(), "lookup", [text], WEIGHTS)
    assert chain.tokens[8].tolist() == [11, 12, 13, 14, 11, 12, 13, 14]
    assert chain.support[8, 0] >= 3
    assert not chain.statistics.any()


@pytest.mark.slow
def test_a_stopped_recording_goes_on_with_its_parts(tmp_path: Path) -> None:
    texts, calls = texts_of(), []

    def source() -> HalfRight:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return HalfRight(texts, 0.7)

    with pytest.raises(KeyboardInterrupt):
        record(texts, source, WEIGHTS, {}, tmp_path, lambda done: None)
    done: list[int] = []
    whole = record(texts, lambda: HalfRight(texts, 0.7), WEIGHTS, {}, tmp_path, done.append)
    assert done == [32, 40]
    assert whole.texts == TEXTS
    assert (tmp_path / "000000.npz").is_file()


def test_a_trace_is_read_as_it_was_written(trace: Trace, tmp_path: Path) -> None:
    save_trace(trace, tmp_path / "a.npz")
    read = load_trace(tmp_path / "a.npz")
    assert read.tokens.tolist() == trace.tokens.tolist()
    for name, chain in trace.chains.items():
        assert (read.chains[name].statistics == chain.statistics).all()
        assert (read.chains[name].flags == chain.flags).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no .npz file"), (b"no zip", "no .npz file"), (b"PK", "no .npz file"), (None, "No such file")],
)
def test_a_file_without_a_trace_is_an_error(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ModelError, match=f"holds no trace .*{message}"):
        load_trace(tmp_path / "a.npz")


def test_a_damaged_file_is_never_another_error(trace: Trace, tmp_path: Path) -> None:
    save_trace(trace, tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    rng = np.random.default_rng(1)
    for place in rng.integers(0, len(whole), 60).tolist():
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]):
            (tmp_path / "a.npz").write_bytes(content)
            with suppress(ModelError):
                load_trace(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": None}, "it lacks starts"),
        ({"hidden_flags": None}, "it lacks hidden_flags"),
        ({"facts": np.array("[]")}, "version None, not 1"),
        ({"facts": np.array("no JSON")}, "Expecting value"),
        ({"facts": np.array('{"version": 2}')}, "version 2, not 1"),
        ({"starts": np.array(3)}, "starts has the shape"),
        ({"starts": np.array([0, 2000])}, "has the shape"),
        ({"tokens": np.zeros(2000)}, "tokens has the shape .* of float64, not .* of int32"),
        ({"tokens": np.full(2000, -1, np.int32)}, "tokens has negative token ids"),
        ({"temperature": np.zeros(3, np.float32)}, "temperature has the shape"),
        ({"temperature": np.full(40, np.nan, np.float32)}, "temperature has numbers that are not finite"),
        ({"lookup_tokens": np.zeros((2000, 9), np.int32)}, "lookup_tokens has the shape"),
        ({"combined_statistics": np.zeros((2000, 8, 3))}, "combined_statistics has the shape"),
        ({"hidden_support": np.zeros((5, 8), np.uint8)}, "hidden_support has the shape"),
    ],
)
def test_arrays_that_are_no_trace_are_refused(
    trace: Trace, tmp_path: Path, change: dict[str, NDArray[Any] | None], message: str
) -> None:
    save_trace(trace, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = {name: file[name] for name in file.files} | change
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ModelError, match=message):
        load_trace(tmp_path / "a.npz")


@pytest.mark.parametrize("starts", [[1, *range(50, 2001, 50)], [0, 50, 50, *range(150, 2001, 50)]])
def test_every_text_of_a_trace_has_a_token(trace: Trace, tmp_path: Path, starts: list[int]) -> None:
    save_trace(replace(trace, starts=np.array(starts)), tmp_path / "a.npz")
    with pytest.raises(ModelError, match="starts must rise from 0 to the 2000 tokens"):
        load_trace(tmp_path / "a.npz")


@pytest.mark.parametrize("command", ["show", "fit"])
def test_a_broken_trace_is_one_line_of_error(command: str, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK")
    arguments = [
        "trace",
        command,
        str(tmp_path / "a.npz"),
        *(["0.6", "--out", str(tmp_path / "b.npz")] if command == "fit" else []),
    ]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "holds no trace" in result.stderr


def test_a_trace_without_draft_tokens_cannot_be_fitted(trace: Trace) -> None:
    hidden = trace.chains["hidden"]
    without = replace(hidden, flags=np.zeros_like(hidden.flags))
    with pytest.raises(SettingsError, match="none or all are accepted; record another one"):
        fitted(replace(trace, chains={**trace.chains, "hidden": without}), 0.6)


@pytest.mark.parametrize("acceptance", [0.5, 0.6, 0.8, 0.9])
def test_a_fitted_trace_has_the_acceptance_and_is_predicted_as_well(trace: Trace, acceptance: float) -> None:
    made = fitted(trace, acceptance)
    assert made.first_acceptance("hidden") == pytest.approx(acceptance, abs=0.03)
    before, after = (ranking(one, "hidden", WEIGHTS) for one in (trace, made))
    assert before > 0.65
    assert after == pytest.approx(before, abs=0.03)
    assert made.tokens.tolist() == trace.tokens.tolist()
    assert (made.chains["lookup"].tokens == trace.chains["lookup"].tokens).all()


def test_an_acceptance_out_of_range_is_an_error(trace: Trace) -> None:
    with pytest.raises(SettingsError, match="is not between"):
        fitted(trace, 0.95)


def test_texts_follow_one_another_in_an_order_of_the_seed(trace: Trace) -> None:
    text, again = TraceText(trace), TraceText(trace)
    tokens = [text.token(5, index) for index in range(3 * ANSWER)]
    assert [again.token(5, index) for index in reversed(range(3 * ANSWER))] == tokens[::-1]
    answers = [trace.tokens[start : start + ANSWER].tolist() for start in trace.starts[:-1]]
    assert all(tokens[i : i + ANSWER] in answers for i in (0, ANSWER, 2 * ANSWER))
    assert all(text.other(5, index) != token for index, token in enumerate(tokens))


@pytest.fixture
def traced(trace: Trace, tmp_path: Path) -> TwinFolder:
    """A twin with the trace."""
    plain = make_twin(tmp_path)
    vocabulary = ModelFolder(plain.path).vocab_fingerprint
    save_trace(replace(trace, facts={**trace.facts, "vocabulary": vocabulary}), tmp_path / "a.npz")
    return write_twin(str(tmp_path / "profile.json"), tmp_path / "words", tmp_path / "traced", trace=tmp_path / "a.npz")


@pytest.mark.parametrize("names", [("hidden",), ("hidden", "lookup")])
def test_a_twin_drafts_the_tokens_of_its_trace(traced: TwinFolder, names: tuple[str, ...]) -> None:
    source = load_drafting(DraftSettings(target=traced.path)).sources["combined"]
    trace, text = traced.trace, traced.text()
    assert trace is not None
    chain = trace.chains["combined" if len(names) > 1 else "hidden"]
    tokens, prompt = [7] * 10, 10
    for index in range(1, 30):
        tokens.append(text.token(5, index - 1))
        round_ = Controller("fixed", 8, WEIGHTS).session(*names).ahead(8, 0.0)
        start = max(0, source.starts_at("s", len(tokens)) - 1)
        states = States(start, np.zeros((len(tokens) - 1 - start, 1), np.float32))
        [draft] = source.propose([DraftRequest("s", tokens, Sampling(seed=5), round_, names, states, prompt)])
        row = text.place(5, index)  # type: ignore[union-attr]
        assert draft.tokens == chain.tokens[row].tolist()
        assert [one.token.confidence for one in round_.drafted] == chain.statistics[row, :, 0].tolist()
        assert draft.steps == {"hidden": DEPTH}


def test_a_trace_of_another_vocabulary_is_refused(trace: Trace, tmp_path: Path) -> None:
    make_twin(tmp_path)
    save_trace(trace, tmp_path / "a.npz")
    with pytest.raises(ModelError, match="another vocabulary"):
        write_twin(str(tmp_path / "profile.json"), tmp_path / "words", tmp_path / "b", trace=tmp_path / "a.npz")


@pytest.mark.parametrize("name", shipped_traces())
def test_a_shipped_trace_holds_texts_of_all_kinds(name: str) -> None:
    trace = load_trace(trace_path(name))
    kinds = {trace.facts["kinds"][index] for index in trace.kind}
    assert kinds == {template.kind for template in corpus().templates.values() if template.held_out}
    assert np.unique(trace.temperature).tolist() == pytest.approx([0.0, 0.7, 1.0])
    assert 0.4 < trace.first_acceptance("hidden") < trace.first_acceptance("combined") < 0.7
    assert trace.facts["command"]
