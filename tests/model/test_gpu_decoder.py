"""Kernels for GPUs give the compiled pass's logits, and the same bits however a session is computed.

Triton's interpreter computes them on the CPU. `make test-gpu` installs it and runs these tests; without it they are
skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny_families import FAMILIES

from shared.engine import Engine, Step
from shared.kernels.cache import PackedBatch

pytest.importorskip("triton")

from gpu_model import FlawedDecoder, gpu_decoder, logits_of

from shared.gpu_kernels import check
from shared.gpu_kernels.decoder import GpuDecoder
from shared.gpu_kernels.graphs import StepGraphs
from shared.gpu_kernels.products import NARROW, WIDE

Family = Callable[[str], Path]
PROMPT, COMPLETION = 18, 4
"""Tokens of a prompt: more than 16, so that a longrope takes its long factors, and more than a window."""
SHAPES = ["llama", "qwen3", "gemma2", "olmo2", "phi3-partial", "llama-biases"]
"""Grouped queries with norms of heads and rows, windows, soft caps, norms after, part of a head rotated, biases."""
TOLERANCES = {"bfloat16": 0.05, "float16": 0.01}


EDGE = 58
"""Tokens before those that a test computes: they cross the edge of a block."""


def fill(decoder: GpuDecoder) -> None:
    """Fill all blocks with the same random keys and values, as if each began the same session."""
    generator = torch.Generator().manual_seed(0)
    for held in (decoder.keys, decoder.values):
        held.copy_(torch.randn(held[:, :1].shape, generator=generator).expand_as(held))


def random_text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, tiny.VOCAB, (length,), generator=generator).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_logits_and_text_of_the_compiled_pass(name: str, family: Family) -> None:
    folder = family(name)
    decoder = gpu_decoder(folder)
    engine = Engine(folder, dtype="float32", budget_tokens=64)
    engine.attach("s", [])
    text, start = random_text(PROMPT), 0
    for _ in range(COMPLETION):
        new = text[start:]
        logits = logits_of(decoder, new, [3], [len(new)], start)
        expected = engine.forward([Step("s", new, len(new))]).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        token = int(logits[-1].argmax())
        assert token == int(expected[-1].argmax())
        start, text = len(text), [*text, token]


@pytest.mark.parametrize("form", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SHAPES[:3])
def test_half_formats_differ_from_float32_by_their_roundings(name: str, form: str, family: Family) -> None:
    text = random_text(PROMPT)
    expected = logits_of(gpu_decoder(family(name)), text, [0], [PROMPT])
    logits = logits_of(gpu_decoder(family(name), form), text, [0], [PROMPT])
    assert 0 < float((logits - expected).std() / expected.std()) < TOLERANCES[form]


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "bfloat16") for name in SHAPES), ("qwen3", "float16"), ("qwen3", "float32")]
)
def test_decode_verify_chunks_and_batches_have_the_same_bits(name: str, form: str, family: Family) -> None:
    decoder = gpu_decoder(family(name), form)
    fill(decoder)
    first, second = random_text(11, seed=1), random_text(6, seed=2)
    whole = logits_of(decoder, first, [0, 1], [11], start=EDGE)
    alone = logits_of(decoder, second, [7], [6])
    # Verification of 5, decoding across the edge of a block, and a chunk of prefill.
    decoder.joins_runs = False
    assert torch.equal(logits_of(decoder, first, [2, 1], [5, 1, 1, 4], start=EDGE), whole)
    # Both sessions in each pass, in either order.
    decoder.joins_runs = None
    sessions = {1: ([4, 5], EDGE, first, whole), 2: ([7], 0, second, alone)}
    done = {1: 0, 2: 0}
    for order, counts in (((1, 2), (4, 1)), ((2, 1), (5, 7))):
        batch = PackedBatch(
            [sessions[which][0] for which in order],
            [sessions[which][1] + done[which] for which in order],
            counts,
        )
        taken = {which: slice(done[which], done[which] + n) for which, n in zip(order, counts, strict=True)}
        tokens = [token for which in order for token in sessions[which][2][taken[which]]]
        _, logits = decoder.forward(batch, tokens=tokens, wanted=range(len(tokens)))
        assert torch.equal(logits, torch.cat([sessions[which][3][taken[which]] for which in order]))
        done = {which: done[which] + n for which, n in zip(order, counts, strict=True)}
    assert done == {1: 11, 2: 6}


def test_wide_tiles_have_the_bits_of_narrow_ones(family: Family) -> None:
    decoder = gpu_decoder(family("qwen3"), "bfloat16")
    product, x = decoder.products()[0], torch.randn(64, decoder.products()[0].depth).bfloat16()
    assert torch.equal(decoder.multiply_rows(product, x, WIDE), decoder.multiply_rows(product, x, NARROW))
    text = random_text(64)
    narrow = logits_of(decoder, text, [0], [64])
    decoder.wide_tiles = True
    assert torch.equal(logits_of(decoder, text, [2], [64]), narrow)


def test_a_session_after_rollback_has_the_bits_of_a_new_one(family: Family) -> None:
    decoder = gpu_decoder(family("llama"), "bfloat16")
    fill(decoder)
    text, rejected = random_text(9), random_text(8, seed=5)
    expected = logits_of(decoder, text, [0, 1], [9], start=EDGE)
    logits_of(decoder, [*text[:3], *rejected], [2, 3], [11], start=EDGE)
    assert torch.equal(logits_of(decoder, text[3:], [2, 3], [5, 1], start=EDGE + 3), expected[3:])


def test_a_shared_or_copied_block_gives_the_bits_of_an_own_one(family: Family) -> None:
    decoder = gpu_decoder(family("llama"), "bfloat16")
    fill(decoder)
    text = random_text(9)
    expected = logits_of(decoder, text, [0, 1], [9], start=EDGE)[6:]
    assert torch.equal(logits_of(decoder, text[6:], [0, 2], [3], start=64), expected)
    for source, target in zip(decoder.views(0), decoder.views(3), strict=True):
        target.copy_(source)
    assert torch.equal(logits_of(decoder, text[6:], [3, 4], [1, 2], start=64), expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_long_sessions_have_the_same_bits_in_parallel_and_in_order(name: str, family: Family) -> None:
    """Runs of 256 keys are computed in parallel and joined, or one after the other; a window hides the first ones."""
    decoder = gpu_decoder(family(name), "bfloat16", blocks=9)
    fill(decoder)
    text, table = random_text(8), list(range(9))
    results = []
    for joins, counts in ((True, [8]), (False, [8]), (True, [1, 1, 1, 1, 4]), (False, [3, 5])):
        decoder.joins_runs = joins
        results.append(logits_of(decoder, text, table, counts, start=509))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_earlier_content_of_a_block_changes_nothing(family: Family) -> None:
    decoder = gpu_decoder(family("llama"), "bfloat16")
    text = random_text(9)
    expected = logits_of(decoder, text, [0], [9])
    decoder.keys.fill_(float("nan"))
    decoder.values.fill_(float("nan"))
    assert torch.equal(logits_of(decoder, text, [4], [3, 1, 5]), expected)


def test_a_pass_without_wanted_rows_keeps_its_kv(family: Family) -> None:
    decoder = gpu_decoder(family("llama"))
    text = random_text(6)
    expected = logits_of(decoder, text, [0], [6])
    states, logits = decoder.forward(PackedBatch([[1]], [0], [5]), tokens=text[:5])
    assert logits.shape == (0, tiny.VOCAB)
    assert states.shape == (5, decoder.model.hidden_size)
    assert torch.equal(logits_of(decoder, text[5:], [1], [1], start=5), expected[5:])


def test_graphs_have_the_bits_of_single_launches(family: Family) -> None:
    """Here a graph computes its launches anew: its rows that fill up the ladder change nothing, in KV neither."""
    decoder = gpu_decoder(family("qwen3"), "bfloat16")
    fill(decoder)
    text = random_text(8)
    expected = logits_of(decoder, text, [0, 1], [8], start=EDGE)
    captured: list[int] = []

    def capture(compute: Callable[[], object]) -> Callable[[], object]:
        captured.append(1)
        return compute

    fill(decoder)
    decoder.graphs = StepGraphs(decoder, rows=(1, 4), capture=capture)
    before = decoder.keys.clone()
    assert torch.equal(logits_of(decoder, text, [2, 3], [3, 1, 1, 3], start=EDGE), expected)
    assert len(captured) == 2
    changed = (decoder.keys != before).any(-1).any(2).any(0)
    assert changed.nonzero().tolist() == [*([2, place] for place in range(EDGE, 64)), [3, 0], [3, 1]]


def test_graphs_are_captured_again_when_a_buffer_has_moved(family: Family) -> None:
    decoder = gpu_decoder(family("llama"), "bfloat16")
    captured: list[int] = []

    def capture(compute: Callable[[], object]) -> Callable[[], object]:
        captured.append(decoder.moves)
        return compute

    graphs = StepGraphs(decoder, rows=(1,), capture=capture)
    decoder.reserve(1, 1)
    for _ in range(2):
        assert graphs.logits(1, 1) is not None
    decoder.reserve(2 * 64 + 1, 1)
    graphs.logits(1, 1)
    assert len(captured) == len(set(captured)) == 2


def test_a_batch_takes_the_next_larger_graph(family: Family) -> None:
    graphs = StepGraphs(gpu_decoder(family("llama")))
    assert [graphs.rung(rows, 1) for rows in (1, 3, 256, 257)] == [(1, 1), (4, 1), (256, 1), None]
    assert [graphs.rung(1, runs) for runs in (2, 4, 5, 1024, 1025)] == [(1, 4), (1, 4), (1, 16), (1, 1024), None]


def test_graphs_for_the_longest_session_are_captured_at_start(family: Family) -> None:
    decoder = gpu_decoder(family("llama"), blocks=9)
    captured: list[int] = []

    def capture(compute: Callable[[], object]) -> Callable[[], object]:
        captured.append(decoder.moves)
        return compute

    before = decoder.keys.clone()
    StepGraphs(decoder, rows=(1, 2), capture=capture).prepare()
    assert decoder.model.max_len > 9 * 64 > 2 * 256
    assert len(captured) == 4  # of one or two rows, and of one or four runs, as the cache is shorter than the model
    assert len(set(captured)) == 1
    assert torch.equal(decoder.keys, before)


@pytest.mark.parametrize(
    ("tiles", "batches", "exact", "wide", "has_graphs"),
    [
        (True, [True, True], True, True, True),
        (False, [True, True], True, False, True),
        (True, [False, True, True], True, False, True),
        (True, [False, False], False, False, True),
        (True, [True, False], True, True, False),
    ],
)
def test_options_that_change_bits_are_left_out(
    tiles: bool, batches: list[bool], exact: bool, wide: bool, has_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder: Any = SimpleNamespace(wide_tiles=False, graphs=None)
    answers = iter(batches)
    monkeypatch.setattr(check, "tiles_agree", lambda _decoder: tiles)
    monkeypatch.setattr(check, "batches_agree", lambda *_arguments: next(answers))
    assert check.settle(decoder, 8, 328, lambda _decoder: StepGraphs.__new__(StepGraphs)) == exact
    assert (decoder.wide_tiles, decoder.graphs is not None) == (wide, has_graphs)
    assert next(answers, None) is None


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize(("flaw", "agrees"), [(0.0, True), (1e-3, False)])
def test_the_check_at_load_finds_bits_that_depend_on_the_batch(
    flaw: float, agrees: bool, blocks: int, family: Family
) -> None:
    decoder: Any = FlawedDecoder(gpu_decoder(family("llama"), on="meta").model, flaw)
    assert check.batches_agree(decoder, blocks, 328) == agrees
