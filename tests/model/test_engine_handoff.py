"""Blocks of KV that go from one engine to another: the bits are the same, and nothing is taken that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from shared.engine import Engine, Step
from shared.engine.blocks import block_names
from shared.errors import EngineError
from shared.kernels.layout import BLOCK

TOKENS = [(7 * i + 3) % tiny.VOCAB for i in range(3 * BLOCK + 20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model"))


def engine(folder: Path, *, blocks: int = 16, dtype: str = "bfloat16", keep_hidden: bool = True) -> Engine:
    return Engine(folder, dtype=dtype, budget_tokens=blocks * BLOCK, keep_hidden=keep_hidden)


def computed(folder: Path, dtype: str = "bfloat16") -> Engine:
    """An engine that holds the tokens but for the last, in pieces as rounds would have made them."""
    one = engine(folder, dtype=dtype)
    one.attach("s", TOKENS[:1])
    for start in range(0, len(TOKENS) - 1, 37):
        one.forward([Step("s", TOKENS[start : min(start + 37, len(TOKENS) - 1)])])
    one.attach("s", TOKENS)
    return one


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adopted_blocks_give_the_same_bits(folder: Path, dtype: str) -> None:
    giver, taker = computed(folder, dtype), engine(folder, dtype=dtype)
    names = block_names(TOKENS[:-1])
    assert len(names) == 3
    assert giver.layout == taker.layout
    for name in names:
        content = giver.block(name)
        assert content is not None
        assert len(content) == giver.block_bytes
        assert taker.adopt(name, content)
    assert taker.attach("s", TOKENS) == 3 * BLOCK
    step = Step("s", TOKENS[3 * BLOCK :], rows=5)
    logits = taker.forward([step]).logits
    giver.truncate("s", 3 * BLOCK)
    assert torch.equal(logits, giver.forward([step]).logits)
    alone = engine(folder, dtype=dtype)
    alone.attach("s", TOKENS)
    assert torch.equal(logits, alone.forward([Step("s", TOKENS, rows=5)]).logits)
    assert torch.equal(taker.hidden("s", 0, len(TOKENS)), alone.hidden("s", 0, len(TOKENS)))
    taker.integrity()


def test_a_block_is_taken_once_and_only_into_room_that_is_free(folder: Path) -> None:
    giver, taker = computed(folder), engine(folder, blocks=2)
    names = block_names(TOKENS)
    contents = [giver.block(name) or b"" for name in names]
    taker.attach("busy", TOKENS[:1])
    taker.forward([Step("busy", TOKENS[::-1][: BLOCK + 1])])
    assert not taker.adopt(names[0], contents[0]), "both blocks are in use"
    taker.release("busy")
    assert taker.adopt(names[0], contents[0])
    assert not taker.adopt(names[0], contents[0])
    assert taker.has_block(names[0])
    taker.integrity()


def test_content_of_another_size_is_refused(folder: Path) -> None:
    taker = engine(folder)
    with pytest.raises(EngineError, match="block of 3 bytes"):
        taker.adopt(b"x" * 16, b"abc")
    assert not taker.has_block(b"x" * 16)
    assert engine(folder).layout != engine(folder, keep_hidden=False).layout
    assert engine(folder).block_bytes < engine(folder, dtype="float32").block_bytes


def test_names_depend_on_all_tokens_up_to_a_blocks_end() -> None:
    names = block_names(TOKENS)
    assert block_names(TOKENS[: 2 * BLOCK]) == names[:2]
    changed = [TOKENS[0] + 1, *TOKENS[1:]]
    assert not set(block_names(changed)) & set(names)
    assert block_names(TOKENS[: BLOCK - 1]) == []
