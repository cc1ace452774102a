"""A position's logits have the same bits however its session came there, on the real model.

Compiled code computes all of it, and module code, which is slow on many CPUs, its first layers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from shared.engine import Engine, Step, compiled_pass
from shared.engine.blocks import block_names
from shared.kernels.layout import BLOCK
from shared.models.description import NotDescribed

TEXTS = [
    "The harbour of the old town was built in three stages. First came a wooden pier, where fishermen sold herring "
    "before sunrise; then, in 1743, a breakwater of granite; and at last the cranes. " * 12,
    "def merge(left, right):\n    out = []\n    while left and right:\n        out.append((left if left[0] <= right[0] "
    "else right).pop(0))\n    return out + left + right\n\n\n"
    "assert merge([1, 4], [2, 3]) == [1, 2, 3, 4]\n" * 12,
    "Liste der Zutaten: 250 g Mehl, 3 Eier, 1/2 l Milch, 1 Prise Salz, etwas Öl. Alles verrühren, 20 Minuten ruhen "
    "lassen, dann dünn ausbacken. 材料を混ぜて、薄く焼く。 " * 12,
]
LENGTH = 150
CHUNKS = (1, 1, 2, 3, 5, 9, 9, 17, 40)


LAYERS = 3
"""Layers that module code computes."""
VOCABULARY = 12288
"""Tokens that its model has: the head of all of them would take most of the time."""


@dataclass(frozen=True)
class Setup:
    """A format of weights, and compiled or module code."""

    dtype: str
    code: str

    def engine(self, folder: Path, *, budget_tokens: int, threads: int = 1) -> Engine:
        with pytest.MonkeyPatch.context() as patch:
            if self.code == "module":
                patch.setattr(compiled_pass, "described", refuse)
            engine = Engine(folder, dtype=self.dtype, threads=threads, budget_tokens=budget_tokens)
        assert bool(engine.module_code_reason) == (self.code == "module")
        return engine


def refuse(*args: object) -> None:
    """Describe no model, so that module code computes it."""
    raise NotDescribed("for a test")


SETUPS = [
    *(Setup(dtype, "compiled") for dtype in ("gguf", "bfloat16", "float32", "int8")),
    *(Setup(dtype, "module") for dtype in ("bfloat16", "float32")),
]


@dataclass
class Case:
    """An engine, the tokens of some texts, and the logits of all their positions from another, one-thread engine."""

    engine: Engine
    texts: list[list[int]]
    expected: list[torch.Tensor]

    def feed(self, plan: dict[str, tuple[int, int]]) -> int:
        """One pass: each session (named `<text>-…`) gets that many of its next tokens; compares bits, returns positions
        compared."""
        steps, wanted = [], []
        for name, (count, rows) in plan.items():
            text, held = int(name[0]), self.engine.cached(name)
            steps.append(Step(name, self.texts[text][held : held + count], min(rows, count)))
            wanted.append(self.expected[text][held + count - min(rows, count) : held + count])
        output = self.engine.forward(steps)
        for i, (step, bits) in enumerate(zip(steps, wanted, strict=True)):
            got = output.logits[output.rows(i)]
            differing = int((got != bits).sum())
            assert differing == 0, f"{step.session_id}: {differing} logits differ, by up to {(got - bits).abs().max()}"
        return sum(len(bits) for bits in wanted)


@dataclass(frozen=True)
class Expected:
    """The logits of all positions of some texts, each computed in one pass by one thread."""

    setup: Setup
    folder: Path
    texts: list[list[int]]
    logits: list[torch.Tensor]


@pytest.fixture(scope="module")
def first_layers(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model without its later layers and tokens."""
    folder = tmp_path_factory.mktemp("first-layers")
    with safe_open(target_folder / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if not _is_later(name)]  # noqa: SIM118 - a file is no mapping
        tensors = {name: file.get_tensor(name) for name in names}
    embedding = "model.embed_tokens.weight"  # and the head
    tensors[embedding] = tensors[embedding][:VOCABULARY].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((target_folder / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _is_later(name: str) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= LAYERS


@pytest.fixture(scope="module", params=SETUPS, ids=lambda setup: f"{setup.code}-{setup.dtype}")
def expected(request: pytest.FixtureRequest, target_folder: Path, first_layers: Path) -> Expected:
    setup: Setup = request.param
    folder = target_folder if setup.code == "compiled" else first_layers
    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    engine = setup.engine(folder, budget_tokens=1024)
    texts = [[token % engine.vocab_size for token in tokenizer.encode(text).ids[:LENGTH]] for text in TEXTS]
    assert all(len(tokens) == LENGTH for tokens in texts)
    logits = []
    for tokens in texts:
        engine.attach("whole", [])
        logits.append(engine.forward([Step("whole", tokens, LENGTH)]).logits)
        engine.release("whole")
    return Expected(setup, folder, texts, logits)


@pytest.fixture(scope="module", params=[1, 2], ids=["1-thread", "2-threads"])
def case(request: pytest.FixtureRequest, expected: Expected) -> Iterator[Case]:
    engine = expected.setup.engine(expected.folder, threads=request.param, budget_tokens=1280)
    yield Case(engine, expected.texts, expected.logits)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _empty_cache(case: Case) -> Iterator[None]:
    yield
    case.engine.integrity()
    for session in case.engine.sessions:
        case.engine.release(session)


def test_the_machine_can_be_exact(case: Case) -> None:
    assert case.engine.batch_invariant


def test_one_token_at_a_time(case: Case) -> None:
    engine = case.engine
    compared = 0
    for start in (0, 120, LENGTH - 10):  # a beginning, a block boundary, an end
        engine.attach("0-decode", case.texts[0])
        engine.truncate("0-decode", start)
        if engine.cached("0-decode") < start:
            case.feed({"0-decode": (start - engine.cached("0-decode"), 0)})
        for _ in range(10):
            compared += case.feed({"0-decode": (1, 1)})
    assert compared == 30


def test_verification_in_random_chunks(case: Case) -> None:
    choose = random.Random(1)
    compared = 0
    case.engine.attach("2-chunks", [])
    while case.engine.cached("2-chunks") < LENGTH:
        count = min(choose.choice(CHUNKS), LENGTH - case.engine.cached("2-chunks"))
        compared += case.feed({"2-chunks": (count, count)})
    assert compared == LENGTH


def test_mixed_with_random_other_sessions(case: Case) -> None:
    choose = random.Random(2)
    names = [f"{text}-mixed" for text in range(3)]
    compared = 0
    for name in names:
        case.engine.attach(name, [])
    for turn in range(200):
        running = [name for name in names if case.engine.cached(name) < LENGTH]
        if not running:
            break
        plan = {}
        for name in choose.sample(running, choose.randint(1, len(running))):
            count = min(choose.choice(CHUNKS), LENGTH - case.engine.cached(name))
            plan[name] = (count, count)
        # Strangers of the same batch: prompts and single tokens, dropped again at once.
        others = [f"{choose.randrange(3)}-other-{turn}-{i}" for i in range(choose.choice([0, 1, 4]))]
        for other in others:
            case.engine.attach(other, [])
            plan[other] = (choose.choice([1, 9]), 0)
        compared += case.feed(dict(choose.sample(list(plan.items()), len(plan))))
        for other in others:
            case.engine.release(other)
    assert compared == 3 * LENGTH


def test_after_rejected_drafts(case: Case) -> None:
    choose = random.Random(3)
    compared = 0
    case.engine.attach("1-drafts", [])
    case.feed({"1-drafts": (50, 1)})
    while (held := case.engine.cached("1-drafts")) < LENGTH - 10:
        rejected = [choose.randrange(case.engine.vocab_size) for _ in range(choose.choice([1, 4, 8]))]
        case.engine.forward([Step("1-drafts", rejected)])
        case.engine.truncate("1-drafts", held)
        compared += case.feed({"1-drafts": (9, 9)})
    assert compared >= 90


def test_on_shared_prefixes_and_after_eviction(case: Case) -> None:
    engine = case.engine
    engine.attach("2-first", case.texts[2])
    case.feed({"2-first": (LENGTH, 0)})
    engine.attach("2-first", case.texts[2])  # its blocks are known to be committed now
    assert engine.attach("2-second", case.texts[2]) == LENGTH // 64 * 64
    assert case.feed({"2-second": (4, 4)}) == 4
    engine.truncate("2-second", 90)  # into a block that the first still uses
    assert case.feed({"2-second": (60, 60)}) == 60
    engine.truncate("2-first", LENGTH - 10)
    assert case.feed({"2-first": (10, 10)}) == 10
    fillers = [f"0-filler-{i}" for i in range(engine.budget_tokens // BLOCK)]  # a block each: all of the budget
    for filler in fillers:
        engine.attach(filler, [])
    engine.forward([Step(filler, [7], 0) for filler in fillers])
    assert engine.cached("2-first") == 0
    engine.attach("2-first", case.texts[2])
    while (left := LENGTH - engine.cached("2-first")) > 0:
        case.feed({"2-first": (min(left, 100), 100)})


def test_after_rollback_to_every_part_of_a_block(case: Case) -> None:
    engine, compared = case.engine, 0
    engine.attach("0-rollback", case.texts[0])
    case.feed({"0-rollback": (LENGTH - 10 - engine.cached("0-rollback"), 0)})
    for length in (131, 128, 127, 65, 64, 63, 1, 0):
        engine.truncate("0-rollback", length)
        compared += case.feed({"0-rollback": (2, 2)})
    assert compared == 16


def test_on_blocks_of_another_engine(case: Case) -> None:
    engine, text = case.engine, case.texts[1]
    engine.attach("1-giver", [])
    case.feed({"1-giver": (100, 0)})
    case.feed({"1-giver": (LENGTH - 100, 0)})
    engine.attach("1-giver", text)
    blocks = {name: engine.block(name) for name in block_names(text)}
    assert len(blocks) == LENGTH // BLOCK
    engine.reset()  # from here on like another engine, which has computed nothing
    assert engine.cached("1-giver") == 0
    for name, content in blocks.items():
        assert content is not None
        assert engine.adopt(name, content)
    held = LENGTH // BLOCK * BLOCK
    assert engine.attach("1-taker", text) == held
    assert case.feed({"1-taker": (1, 1)}) == 1
    assert case.feed({"1-taker": (LENGTH - held - 1, LENGTH - held - 1)}) > 1
