"""Compiled passes compute every described family: transformers' logits, and the same bits however they are packed."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import structlog
import tiny
import torch
from described_decoder import DescribedDecoder, load
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from services.baseline import engine as baseline_engine
from services.baseline.settings import BaselineSettings
from services.verifier import service as verifier_service
from services.verifier.settings import VerifierSettings
from shared.engine import Engine, Step
from shared.engine.compiled_pass import ARITHMETIC
from shared.errors import EngineError
from shared.kernels.formats import quantized
from shared.kernels.weights import dense
from shared.models.families import describe

FORMS = ("float32", "bfloat16", "int8")
PROMPTS = (83, 71)
"""Tokens of the prompts: more than a block of the KV cache. A pass of transformers has more than 16, so that a longrope
takes its long factors."""
COMPLETION = 24
SPLITS = [
    [(17, 4), (50, 0), (0, 66), (16, 1)],
    [(1, 70), (81, 1), (1, 0)],
    [(8, 0), (7, 0), (9, 62), (59, 9)],
]
"""Ways to feed two prompts: numbers of tokens of the first and of the second session in each pass."""


def random_texts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    choose = random.Random(seed)
    return [choose.choices(range(tiny.VOCAB), k=length) for length in lengths]


class Fed:
    """Two sessions of an engine and the logits of all their tokens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._logits: list[list[torch.Tensor]] = [[], []]
        for name in "ab":
            engine.attach(name, [])

    def feed(self, *pieces: Sequence[int]) -> None:
        """Compute new tokens of both sessions, or of the one that has some, in one pass."""
        fed = [i for i, tokens in enumerate(pieces) if tokens]
        output = self._engine.forward([Step("ab"[i], pieces[i], len(pieces[i])) for i in fed])
        for step, i in enumerate(fed):
            self._logits[i].append(output.logits[output.rows(step)])

    @property
    def logits(self) -> list[torch.Tensor]:
        return [torch.cat(parts) for parts in self._logits]


def split(engine: Engine, texts: Sequence[Sequence[int]], counts: Sequence[tuple[int, int]]) -> Fed:
    """Feed two texts in packed passes of these sizes."""
    fed = Fed(engine)
    done = [0, 0]
    for pair in counts:
        fed.feed(*(text[start : start + count] for text, start, count in zip(texts, done, pair, strict=True)))
        done = [start + count for start, count in zip(done, pair, strict=True)]
    assert done == [len(text) for text in texts]
    return fed


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_logits_and_texts_of_transformers(name: str, family: Callable[[str], Path]) -> None:
    folder = family(name)
    engine = Engine(folder, dtype="float32", budget_tokens=512)
    assert engine.module_code_reason == ""
    assert engine.arithmetic == ARITHMETIC
    texts = random_texts(PROMPTS)
    fed = split(engine, texts, SPLITS[0])
    for _ in range(COMPLETION):
        following = [[int(logits[-1].argmax())] for logits in fed.logits]
        fed.feed(*following)
        texts = [text + token for text, token in zip(texts, following, strict=True)]
    auto_class = AutoModelForImageTextToText if "text-part" in name else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for text, prompt, logits in zip(texts, PROMPTS, fed.logits, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([text])).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        # Each token of the completion is transformers' choice too, given the ones before: its greedy text is the same.
        assert text[prompt:] == expected[prompt - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_split_passes_give_the_bits_of_whole_texts(
    name: str, form: str, family: Callable[[str], Path]
) -> None:
    folder = family(name)
    texts = random_texts(PROMPTS, seed=1)
    whole = []
    engine = Engine(folder, dtype=form, budget_tokens=256)
    for text in texts:
        engine.attach("alone", [])
        whole.append(engine.forward([Step("alone", text, len(text))]).logits)
        engine.release("alone")
    for threads, counts in zip((1, 2, 3), SPLITS, strict=True):
        engine = Engine(folder, dtype=form, budget_tokens=256, threads=threads)
        for logits, expected in zip(split(engine, texts, counts).logits, whole, strict=True):
            assert torch.equal(logits, expected)
    torch.set_num_threads(1)


def calls_of_a_pass(folder: Path) -> int:
    """Return how many functions Python calls in a pass of one token, those of C included."""
    engine = Engine(folder, dtype="bfloat16", budget_tokens=256)
    engine.attach("s", [])
    engine.forward([Step("s", [5, 6, 7], 1)])
    calls = Counter[str]()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        engine.forward([Step("s", [8], 1)])
    finally:
        sys.setprofile(None)
    return calls["call"] + calls["c_call"]


def test_no_python_runs_between_the_operations_of_a_layer(tmp_path: Path) -> None:
    counts = []
    for layers in (2, 12):
        config = copy.deepcopy(tiny.LLAMA)
        config.num_hidden_layers = layers
        counts.append(calls_of_a_pass(tiny.make(tmp_path / str(layers), config)))
    assert counts[0] == counts[1] < 500


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "olmo2", "phi3-partial"])
def test_weights_are_those_of_their_format(name: str, form: str, family: Callable[[str], Path]) -> None:
    """The reference has the same rounded weights in float32; keys and values of bfloat16 explain the difference."""
    folder = family(name)
    text = random_texts([50])[0]
    engine = Engine(folder, dtype=form, budget_tokens=256)
    engine.attach("s", [])
    logits = engine.forward([Step("s", text, len(text))]).logits
    weights = load(folder)
    model = describe(json.loads((folder / "config.json").read_text()), weights.keys())
    expected = DescribedDecoder(model, {name: rounded(weight, form) for name, weight in weights.items()}).logits(text)
    difference = float((logits - expected).std() / expected.std())
    assert difference < (1e-4 if form == "float32" else 0.02)
    unrounded = DescribedDecoder(model, weights).logits(text)
    assert form == "float32" or difference < float((logits - unrounded).std() / unrounded.std())


def rounded(weight: torch.Tensor, form: str) -> torch.Tensor:
    """Return a matrix as a format represents it; biases and gains stay float32."""
    if weight.dim() == 1 or form == "float32":
        return weight
    if form == "bfloat16":
        return weight.bfloat16().float()
    return torch.from_numpy(dense(quantized(weight.numpy()))[:, : weight.shape[1]])


@pytest.fixture
def undescribed(tmp_path: Path) -> Path:
    """A model that only module code computes, with a vocabulary as services need one."""
    return with_vocabulary(tiny.make(tmp_path, tiny.ARCHITECTURES["gpt-neox"]))


def with_vocabulary(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {f"t{i}": i for i in range(tiny.VOCAB)}}}))
    return folder


def test_a_model_without_description_is_computed_by_module_code(undescribed: Path) -> None:
    engine = Engine(undescribed, dtype="float32", budget_tokens=256)
    assert engine.module_code_reason == "model type 'gpt_neox' has no description"
    assert engine.arithmetic != ARITHMETIC
    text = random_texts([40])[0]
    engine.attach("s", [])
    logits = engine.forward([Step("s", text, len(text))]).logits
    model = AutoModelForCausalLM.from_pretrained(undescribed, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(torch.tensor([text])).logits[0], atol=1e-4, rtol=1e-4)


def test_int8_weights_of_a_model_without_description_are_refused(undescribed: Path) -> None:
    with pytest.raises(EngineError, match=r"int8 weights need the compiled pass, .*'gpt_neox'.*WISP_DTYPE=bfloat16"):
        Engine(undescribed, dtype="int8", budget_tokens=256)


NOTICE = "the model is computed by transformers' module code, which is slower"


class NoBroker(Exception):
    """Ends the start of a verifier once its model is loaded."""


async def notices_of_verifier(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the reasons that a verifier logs."""

    async def refuse(*args: object) -> None:
        raise NoBroker

    monkeypatch.setattr(verifier_service.Broker, "connect", refuse)
    settings = VerifierSettings(target=folder, cache_tokens=256, profile=False)
    with structlog.testing.capture_logs() as logs, pytest.raises(NoBroker):
        await verifier_service.serve(settings, "v1", asyncio.Event())
    return [line["reason"] for line in logs if line["event"] == NOTICE]


async def test_a_verifier_logs_why_module_code_computes(
    undescribed: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await notices_of_verifier(undescribed, monkeypatch) == ["model type 'gpt_neox' has no description"]
    described = with_vocabulary(tiny.make(tmp_path_factory.mktemp("llama")))
    assert await notices_of_verifier(described, monkeypatch) == []


def test_a_baseline_logs_why_module_code_computes(undescribed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline_engine, "profile", lambda engine: None)
    ours, theirs = socket.socketpair()
    with ours, theirs, structlog.testing.capture_logs() as logs:
        ours.shutdown(socket.SHUT_WR)  # the API's process has nothing to ask
        baseline_engine._serve(BaselineSettings(target=undescribed, cache_tokens=256), "b1", theirs)
    assert [line["reason"] for line in logs if line["event"] == NOTICE] == ["model type 'gpt_neox' has no description"]
