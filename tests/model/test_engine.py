"""The engine serves any causal LM, refuses what it cannot do without changing anything, and accounts for its cache."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shared.engine import Engine, Step
from shared.engine.attention import BlockCache, GatherCache
from shared.engine.compiled_pass import CompiledPass
from shared.errors import BadStep, CacheFull, EngineError, ModelError, NotAttached, TooLong
from shared.kernels import decoder
from shared.kernels.cache import KvShape, PackedBatch, ScoreOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(folder: Path) -> Engine:
    return Engine(folder, dtype="float32", budget_tokens=512)


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(tiny.VOCAB), k=count)


def state(engine: Engine) -> tuple[int, dict[str, int]]:
    return engine.free_tokens, {session: engine.cached(session) for session in engine.sessions}


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_any_architecture_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, tiny.ARCHITECTURES[name])
    engine = Engine(folder, dtype="float32", budget_tokens=1024)
    texts = [tokens(200, seed) for seed in range(2)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor(texts)).logits
    for i in range(2):
        engine.attach(str(i), [])
    done = 0
    for count in (70, 1, 9, 1, 30, 64, 25):
        output = engine.forward([Step(str(i), texts[i][done : done + count], count) for i in range(2)])
        for i in range(2):
            torch.testing.assert_close(
                output.logits[output.rows(i)], expected[i, done : done + count], atol=2e-4, rtol=2e-4
            )
        done += count
    assert done == 200


def test_a_noisy_copy_agrees_with_its_model_often_but_not_always(folder: Path, tmp_path: Path) -> None:
    texts = tokens(300)
    best = []
    for path in (folder, tiny.make(tmp_path, noise=0.1)):
        engine = Engine(path, dtype="float32", budget_tokens=512)
        engine.attach("s", [])
        best.append(engine.forward([Step("s", texts, 300)]).logits.argmax(-1))
    share = float((best[0] == best[1]).float().mean())
    assert 0.2 < share < 0.98


def test_hidden_states_are_those_that_the_logits_come_from(folder: Path) -> None:
    engine = Engine(folder, dtype="float32", budget_tokens=512, keep_hidden=True)
    engine.attach("s", [])
    output = engine.forward([Step("s", tokens(20), 5)])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    states = engine.hidden("s", 15, 20)
    assert states.shape == (5, engine.hidden_size)
    with torch.inference_mode():
        torch.testing.assert_close(model.lm_head(states), output.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(engine.hidden("s", 18, 99), states[3:]), "as far as they are held"
    engine.truncate("s", 17)
    assert torch.equal(engine.hidden("s", 15, 20), states[:2])
    for nothing in (engine.hidden("s", 17, 20), engine.hidden("s", 10**12, 10**12 + 1), engine.hidden("who", 0, 9)):
        assert nothing.shape == (0, engine.hidden_size)


def test_shared_prefixes_and_block_copies_carry_hidden_states(folder: Path) -> None:
    engine = Engine(folder, dtype="float32", budget_tokens=512, keep_hidden=True)
    text = tokens(150)
    engine.attach("first", [])
    engine.forward([Step("first", text, 0)])
    expected = engine.hidden("first", 0, 150)
    engine.attach("first", [*text, 1])  # all of its blocks are committed now
    assert engine.attach("second", text) == 128
    assert torch.equal(engine.hidden("second", 0, 150), expected[:128])
    engine.truncate("second", 100)  # into a block that the first uses as well: the next token goes into a copy
    other = [tiny.VOCAB - 1 - token for token in text[100:110]]
    engine.forward([Step("second", other, 0)])
    assert torch.equal(engine.hidden("second", 0, 100), expected[:100])
    assert not torch.equal(engine.hidden("second", 100, 110), expected[100:110])
    assert torch.equal(engine.hidden("first", 0, 150), expected)
    engine.release("first")
    engine.release("second")
    assert engine.attach("third", text) == 128
    assert torch.equal(engine.hidden("third", 0, 128), expected[:128]), "nobody used these blocks meanwhile"


def test_an_engine_without_hidden_states_refuses_to_return_them(engine: Engine) -> None:
    assert not engine.keeps_hidden
    with pytest.raises(EngineError, match="keep_hidden=True"):
        engine.hidden("s", 0, 1)


def test_rows_without_logits_cost_no_logits(engine: Engine) -> None:
    for name in "ab":
        engine.attach(name, [])
    output = engine.forward([Step("a", tokens(30), 0), Step("b", tokens(30), 2)])
    assert output.logits.shape == (2, engine.vocab_size)
    assert (output.rows(0), output.rows(1)) == (slice(0, 0), slice(0, 2))
    assert engine.forward([Step("a", tokens(5), 0)]).logits.shape == (0, engine.vocab_size)


def test_a_shared_prefix_takes_room_once(engine: Engine) -> None:
    prompt = tokens(200)
    engine.attach("first", [])
    engine.forward([Step("first", prompt, 0)])
    engine.attach("first", [*prompt, 1])
    before = engine.free_tokens
    for i in range(3):
        assert engine.attach(str(i), prompt) == 192
        assert engine.free_tokens == before
    engine.forward([Step(str(i), prompt[192:]) for i in range(3)])
    assert engine.free_tokens == before - 3 * 64
    engine.integrity()


def test_a_call_that_does_not_fit_changes_nothing(engine: Engine) -> None:
    for name in "ab":
        engine.attach(name, [])
    engine.forward([Step("a", tokens(100), 0), Step("b", tokens(100), 0)])
    before = state(engine)
    for steps, error in [
        ([Step("a", tokens(200)), Step("b", tokens(200))], CacheFull),
        ([Step("a", tokens(450))], TooLong),
        ([Step("a", tokens(1000))], TooLong),
        ([Step("a", [1]), Step("stranger", [1])], NotAttached),
        ([Step("a", [1]), Step("a", [1])], BadStep),
        ([Step("a", [1]), Step("b", [tiny.VOCAB])], BadStep),
        ([Step("a", [1]), Step("b", [-1])], BadStep),
        ([Step("a", [], 0)], BadStep),
        ([Step("a", [1], 2)], BadStep),
        ([], BadStep),
    ]:
        with pytest.raises(error):
            engine.forward(steps)
        assert state(engine) == before
        engine.integrity()


def test_a_pass_that_fails_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.attach("a", [])
    expected = engine.forward([Step("a", tokens(100), 1)]).logits
    engine.truncate("a", 90)
    before = state(engine)
    run = CompiledPass.run

    def fail_at_the_end(self: CompiledPass, *args: object) -> None:
        run(self, *args)  # type: ignore[arg-type]
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(CompiledPass, "run", fail_at_the_end)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.forward([Step("a", tokens(200, seed=5))])
    assert state(engine) == before
    engine.integrity()
    assert torch.equal(engine.forward([Step("a", tokens(100)[90:])]).logits, expected)


def test_a_session_that_is_too_long_names_the_limit(folder: Path) -> None:
    engine = Engine(folder, dtype="float32", budget_tokens=4096)
    engine.attach("s", [])
    with pytest.raises(TooLong, match="the model's context is 1024"):
        engine.forward([Step("s", tokens(1025))])
    engine.forward([Step("s", tokens(1024))])
    with pytest.raises(TooLong, match="1025"):
        engine.forward([Step("s", [1])])


def test_rolling_back_takes_as_long_at_any_length(folder: Path) -> None:
    engine = Engine(folder, dtype="float32", budget_tokens=1024)
    engine.attach("s", [])
    took: dict[int, list[float]] = {40: [], 1000: []}
    for length in took:
        engine.forward([Step("s", tokens(length + 8 - engine.cached("s")), 0)])
        for _ in range(30):
            start = time.perf_counter()
            engine.truncate("s", length)
            took[length].append(time.perf_counter() - start)
            engine.forward([Step("s", tokens(8), 0)])
    assert median(took[1000]) < 5 * median(took[40])


@pytest.mark.parametrize(
    "scores",
    [ScoreOptions(0.1), ScoreOptions(0.1, window=50), ScoreOptions(0.1, softcap=2.0), ScoreOptions(0.1, chunk=48)],
)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_both_caches_compute_the_same_attention(scores: ScoreOptions, has_sinks: bool) -> None:
    shape = KvShape(layers=2, kv_heads=2, heads=6, head_size=80)
    caches = [
        BlockCache(shape, 12, torch.float32, threads=2),
        GatherCache(shape, 12, torch.float32, torch.device("cpu")),
    ]
    generator = torch.Generator().manual_seed(0)
    sinks = 3 * torch.randn(6, generator=generator) if has_sinks else None
    tables = [[7, 2, 9], [4, 0, 11, 5]]
    starts = [0, 0]
    for counts in ([100, 70], [1, 9], [20, 1], [9, 150]):
        q, k, v = (torch.randn(sum(counts), heads, 80, generator=generator) for heads in (6, 2, 2))
        results = []
        for cache in caches:
            cache.begin(PackedBatch(tables, starts, counts))
            results.append(cache.attend(1, q, k, v, scores, sinks))
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
        for cache in caches:  # a block moves
            for source, copy in zip(cache.views(tables[0][0]), cache.views(1), strict=True):
                copy.copy_(source)
        tables[0][0] = 1


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="wisp models prepare"):
        Engine(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(ModelError, match=r"lacks model\.safetensors"):
        Engine(tmp_path)


@pytest.mark.parametrize("token", [1.5, None, "1", 2**70, [1], float("nan")])
def test_tokens_that_are_no_integers_are_refused(engine: Engine, token: object) -> None:
    engine.attach("s", [])
    before = state(engine)
    with pytest.raises(BadStep, match="token ids must be integers"):
        engine.forward([Step("s", [1, token])])  # type: ignore[list-item]
    with pytest.raises(BadStep, match="logit rows"):
        engine.forward([Step("s", [1, 2], 1.5)])  # type: ignore[arg-type]
    assert state(engine) == before
    engine.forward([Step("s", np.array([1, 2]).tolist())])


FORKED = """
import os, signal, sys
from shared.engine import Engine, Step

def computed():
    engine.attach(str(os.getpid()), [])
    return engine.forward([Step(str(os.getpid()), list(range(40)), 40)]).logits.numpy().tobytes()

engine = Engine(sys.argv[1], threads=2, budget_tokens=512)
expected = computed()
child = os.fork()
if not child:
    signal.alarm(60)  # ends a process that hangs
    os._exit(0 if computed() == expected else 1)
_, status = os.waitpid(child, 0)
assert computed() == expected
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
def test_a_forked_process_computes_the_same_and_does_not_hang(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORKED, str(folder)], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_named(folder: Path, device: str) -> None:
    with pytest.raises(EngineError, match=rf"device '{device}' cannot be used here \(.+\); WISP_DEVICE=cpu works"):
        Engine(folder, device=device)


def test_senseless_settings_are_refused(folder: Path) -> None:
    for wrong in ({"dtype": "int3"}, {"budget_tokens": 10}, {"threads": 0}):
        with pytest.raises(EngineError, match="at least"):
            Engine(folder, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_missing_weight_is_never_made_up(folder: Path, tmp_path: Path, dtype: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises((ModelError, EngineError), match="down_proj"):
        Engine(tmp_path, dtype=dtype)


@pytest.mark.parametrize("length", [1, 1100])
def test_a_pass_without_memory_leaves_the_next_one_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """length: with 1,100 tokens the table of rotations grows as well; then it is that which finds no memory."""
    long = tokens(length + 60)
    expected = Engine(folder, dtype="float32", budget_tokens=2048)
    monkeypatch.setattr(expected, "max_len", 2000)
    expected.attach("s", [])
    wanted = expected.forward([Step("s", long, 5)]).logits
    engine = Engine(folder, dtype="float32", budget_tokens=2048)
    monkeypatch.setattr(engine, "max_len", 2000)
    engine.attach("s", [])
    engine.forward([Step("s", [1, 2, 3])])
    engine.attach("s", [])
    made = 0

    def some_memory(*args: object) -> object:
        nonlocal made
        made += 1
        if made == 3:
            raise MemoryError
        return zeros(*args)  # type: ignore[arg-type]

    zeros = np.zeros
    with monkeypatch.context() as patch:
        if length == 1:
            patch.setattr(decoder.np, "zeros", some_memory)
        else:
            patch.setattr(decoder, "rotation_table", no_memory)
        with pytest.raises(MemoryError):
            engine.forward([Step("s", long, 5)])
    assert torch.equal(engine.forward([Step("s", long, 5)]).logits, wanted)


def no_memory(*args: object) -> None:
    raise MemoryError
