"""The draft's compiled pass computes what torch's modules compute, with bits that no other session changes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES
from torch import Tensor
from transformers import LlamaConfig

from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.compiled_pass import MAX_ROWS, CompiledDraft
from services.drafter.hidden.engine import DraftEngine
from services.drafter.hidden.forward import DraftPass, Floats, draft_pass
from services.drafter.hidden.module_pass import ModuleDraft
from services.drafter.hidden.target import not_plain
from shared.engine import Engine, Step
from shared.errors import EngineError, ModelError
from shared.kernels.cache import PackedBatch
from shared.kernels.layout import BLOCK
from shared.models.folder import ModelFolder

ODD = LlamaConfig(
    vocab_size=tiny.VOCAB,
    hidden_size=72,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    rms_norm_eps=1e-3,
    tie_word_embeddings=True,
)
"""Sizes that are no multiples of a panel, a small base of the rotation, and a tied head."""
HEAD_IDS = [3, 500, 7, 64, *range(100, 180)]


def pair(
    folder: Path, config: LlamaConfig, *, layers: int, bottom_layers: int
) -> tuple[HiddenDraftFolder, ModelFolder]:
    target = tiny.target(folder / "target", config=config)
    made = tiny.hidden_draft(folder, target, layers=layers, bottom_layers=bottom_layers, head_ids=HEAD_IDS)
    return made, target


def batches(seed: int, size: int) -> list[tuple[list[int], Floats, PackedBatch]]:
    """Return packed batches of three sessions: prompts, one of them longer than a part, then short steps."""
    generator = torch.Generator().manual_seed(seed)
    held, made = [0, 0, 0], []
    blocks = 1 + 2 * MAX_ROWS // BLOCK
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(3)]
    for counts in ([9, MAX_ROWS + 70, 66], [1, 1, 1], [3, 1, 2]):
        tokens = torch.randint(tiny.VOCAB, (sum(counts),), generator=generator).tolist()
        before = torch.randn(sum(counts), size, generator=generator)
        made.append((tokens, before.numpy(), PackedBatch(tables, list(held), counts)))
        held = [h + c for h, c in zip(held, counts, strict=True)]
    return made


def results(computed: DraftPass, work: Sequence[tuple[list[int], Floats, PackedBatch]]) -> tuple[Tensor, Tensor]:
    estimates = [computed.forward(*batch) for batch in work]
    logits = [computed.logits(rows) for rows in estimates]
    return torch.from_numpy(np.concatenate(estimates)), torch.from_numpy(np.concatenate(logits))


@pytest.mark.parametrize("config", [tiny.LLAMA, ODD], ids=["llama", "odd"])
@pytest.mark.parametrize(("bottom_layers", "layers"), [(0, 1), (1, 1), (2, 2)])
def test_the_compiled_pass_computes_what_torch_computes(
    tmp_path: Path, config: LlamaConfig, bottom_layers: int, layers: int
) -> None:
    draft, target = pair(tmp_path, config, layers=layers, bottom_layers=bottom_layers)
    blocks = 3 * (1 + 2 * MAX_ROWS // BLOCK)
    reference = ModuleDraft(draft, target, dtype="float32", torch_device="cpu", blocks=blocks)
    compiled = CompiledDraft(draft, target, form="float32", threads=1, blocks=blocks)
    assert compiled.head_ids.tolist() == reference.head_ids.tolist() == sorted(HEAD_IDS)
    work = batches(5, config.hidden_size)
    (estimates, logits), (expected, expected_logits) = results(compiled, work), results(reference, work)
    assert estimates.std() > 0.1
    torch.testing.assert_close(estimates, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("form", "most"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_smaller_weights_change_the_estimates_little(tmp_path: Path, form: str, most: float) -> None:
    draft, target = pair(tmp_path, tiny.LLAMA, layers=1, bottom_layers=2)
    work = batches(6, 64)
    exact, rounded = (
        results(CompiledDraft(draft, target, form=f, threads=1, blocks=15), work)[0] for f in ("float32", form)
    )
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < most


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_an_estimates_bits_depend_on_its_session_alone(tmp_path: Path, form: str) -> None:
    draft, target = pair(tmp_path, ODD, layers=1, bottom_layers=1)
    work = batches(7, 72)
    together, _ = results(CompiledDraft(draft, target, form=form, threads=2, blocks=15), work)
    for session in range(3):
        alone = []
        for tokens, before, batch in work:
            first = sum(batch.counts[:session])
            rows = slice(first, first + batch.counts[session])
            part = PackedBatch([batch.tables[session]], [batch.starts[session]], [batch.counts[session]])
            alone.append((tokens[rows], before[rows], part))
        found, _ = results(CompiledDraft(draft, target, form=form, threads=1, blocks=15), alone)
        assert torch.equal(found, together[session::3])


def test_int8_weights_are_refused_on_other_devices(tmp_path: Path) -> None:
    draft, target = pair(tmp_path, tiny.LLAMA, layers=1, bottom_layers=1)
    with pytest.raises(EngineError, match="on the CPU only"):
        draft_pass(draft, target, dtype="int8", torch_device="meta", threads=1, blocks=1)


def test_other_torch_devices_are_computed_by_modules(tmp_path: Path) -> None:
    draft, target = pair(tmp_path, tiny.LLAMA, layers=1, bottom_layers=1)
    made = draft_pass(draft, target, dtype="float32", torch_device="meta", threads=1, blocks=1)
    assert isinstance(made, ModuleDraft)
    assert made.head_ids.tolist() == sorted(HEAD_IDS)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_target_of_every_family_can_have_a_draft(tmp_path: Path, name: str, family: Callable[[str], Path]) -> None:
    """Without the target's first layers. Its logits of the target's own states are the target's."""
    folder = Path(shutil.copytree(family(name), tmp_path / "target"))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {f"t{i}": i for i in range(tiny.VOCAB)}}}))
    target = ModelFolder(folder)
    draft = tiny.hidden_draft(tmp_path / "draft", target, bottom_layers=0, head_ids=HEAD_IDS)
    engine = Engine(folder, dtype="float32", budget_tokens=64, keep_hidden=True)
    engine.attach("s", [])
    logits = engine.forward([Step("s", list(range(20)), 20)]).logits.numpy()
    states = engine.hidden("s", 0, 20).numpy()
    compiled = CompiledDraft(draft, target, form="float32", threads=1, blocks=4)
    modules = ModuleDraft(draft, target, dtype="float32", torch_device="cpu", blocks=4)
    for computed in (compiled, modules):
        np.testing.assert_allclose(computed.logits(states), logits[:, sorted(HEAD_IDS)], rtol=1e-4, atol=1e-4)
    batch = PackedBatch([[0]], [0], [20])
    estimates = [each.forward(list(range(20)), states, batch) for each in (compiled, modules)]
    np.testing.assert_allclose(*estimates, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="no plain Llama layers") if not_plain(target) else nullcontext():
        CompiledDraft(
            tiny.hidden_draft(tmp_path / "other", target, bottom_layers=1), target, form="float32", threads=1, blocks=4
        )


def test_a_target_that_is_no_plain_llama_is_refused(tmp_path: Path) -> None:
    draft, target = pair(tmp_path, tiny.LLAMA, layers=1, bottom_layers=1)
    config = target.path / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(ModelError, match=r"no plain Llama layers \(hidden_act 'gelu'\)"):
        DraftEngine(draft, ModelFolder(target.path))


@pytest.mark.slow
def test_a_drafter_on_the_cpu_imports_no_torch_transformers_or_numba(tmp_path: Path) -> None:
    draft, target = pair(tmp_path, tiny.LLAMA, layers=1, bottom_layers=1)
    CompiledDraft(draft, target, form="bfloat16", threads=1, blocks=1)  # compiles the kernels where that is due
    program = f"""
import sys
import services.drafter.service
from services.drafter.settings import DrafterSettings
from services.drafter.sources.registry import load_sources
load_sources(DrafterSettings(target={str(target.path)!r}, hidden_draft={str(draft.path)!r}))["hidden"]
print([name for name in ("torch", "transformers", "numba") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (tiny.VOCAB, 1)),
        ("model.layers.0.input_layernorm.weight", (1,)),
        ("model.layers.0.self_attn.q_proj.weight", (4096, tiny.LLAMA.hidden_size)),
        ("model.layers.0.mlp.down_proj.weight", (tiny.LLAMA.hidden_size, 2000)),
    ],
)
def test_a_target_whose_tensors_do_not_fit_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    draft, target = pair(tmp_path, tiny.LLAMA, layers=1, bottom_layers=1)
    file = target.path / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(shape)}, file)
    with pytest.raises(ModelError, match=re.escape(name.removesuffix("q_proj.weight"))):
        CompiledDraft(draft, target, form="float32", threads=1, blocks=4)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("head_ids", torch.tensor([3, tiny.VOCAB]), f"not ascending ids of a vocabulary of {tiny.VOCAB}"),
        ("head_ids", torch.tensor([-1, 3]), "not ascending ids"),
        ("head_ids", torch.tensor([7, 3]), "not ascending ids"),
        ("head_ids", torch.tensor([3, 3]), "not ascending ids"),
        ("head_ids", torch.tensor([], dtype=torch.int32), "not a list of integers"),
        ("head_ids", torch.tensor([1.0, 2.0]), "not a list of integers"),
        ("head_ids", torch.tensor([[1, 2]]), "not a list of integers"),
        ("head_ids", None, "missing.*head_ids"),
        ("spread", torch.zeros(tiny.LLAMA.hidden_size), "spread, by which states are divided"),
        ("spread", torch.full((tiny.LLAMA.hidden_size,), float("nan")), "spread has values that are not finite"),
        ("norm.weight", torch.full((tiny.LLAMA.hidden_size,), float("inf")), r"norm\.weight has values that are not"),
        ("norm.weight", torch.ones(tiny.LLAMA.hidden_size, dtype=torch.int32), r"norm\.weight is of int32"),
        ("norm.weight", None, r"missing.*norm\.weight"),
        ("other", torch.ones(1), "unexpected.*other"),
    ],
)
@pytest.mark.parametrize("torch_device", ["cpu", "meta"])
def test_a_broken_draft_is_refused(
    tmp_path: Path, name: str, value: Tensor | None, reason: str, torch_device: str
) -> None:
    draft, target = pair(tmp_path, tiny.LLAMA, layers=1, bottom_layers=1)
    file = draft.path / "model.safetensors"
    tensors = {**load_file(file), name: value}
    save_file({key: each for key, each in tensors.items() if each is not None}, file)
    with pytest.raises(ModelError, match=rf"does not fit its config\.json: .*{reason}.*wisp draft train"):
        draft_pass(draft, target, dtype="float32", torch_device=torch_device, threads=1, blocks=4)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_target_whose_weights_are_not_finite_is_refused(tmp_path: Path, name: str) -> None:
    draft, target = pair(tmp_path, tiny.LLAMA, layers=1, bottom_layers=1)
    file = target.path / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, file)
    for torch_device in ("cpu", "meta"):
        with pytest.raises(ModelError, match=rf"{name} has values that are not finite"):
            draft_pass(draft, target, dtype="float32", torch_device=torch_device, threads=1, blocks=4)


def test_a_draft_for_a_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    draft, target = pair(tmp_path, tiny.LLAMA, layers=1, bottom_layers=0)
    config = draft.path / "config.json"
    config.write_text(config.read_text().replace(f'"vocab_size": {tiny.VOCAB}', f'"vocab_size": {10 * tiny.VOCAB}'))
    with pytest.raises(ModelError, match="has a vocabulary of 5120 tokens"):
        DraftEngine(HiddenDraftFolder.open(draft.path), target)
