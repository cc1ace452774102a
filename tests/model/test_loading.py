"""A model loads with all of its weights or not at all, by every way of computing it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_folders
import pytest
import tiny
import tiny_gguf
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import Kind
from transformers import MixtralConfig, PreTrainedConfig
from typer.testing import CliRunner

from services.tools.cli.main import app
from shared.engine import Engine, Step, module_pass, trial
from shared.errors import EngineError, ModelError
from shared.models import prepare as preparing
from shared.models.folder import ModelFolder
from shared.models.gguf_file import GgufFile
from shared.models.prepare import prepare, try_model

MIXTRAL = MixtralConfig(
    vocab_size=tiny.VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    max_position_embeddings=512,
)
MODELS: dict[str, PreTrainedConfig] = {"llama": tiny.LLAMA, "gpt-neox": tiny.GPT_NEOX, "mixtral": MIXTRAL}
"""The first is computed by compiled code, the others by module code."""
Tensors = dict[str, torch.Tensor]
Change = Callable[[Path, Callable[[Tensors], None]], Path]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.make(tmp_path_factory.mktemp(name), config) for name, config in MODELS.items()}


def changed(folder: Path, to: Path, change: Callable[[Tensors], object] = lambda tensors: None, **config: Any) -> Path:
    """Return a copy with other tensors, or another configuration; ... removes a key."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    values = {**json.loads((folder / "config.json").read_text()), **config}
    (to / "config.json").write_text(json.dumps({key: each for key, each in values.items() if each is not ...}))
    return to


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_name(
    originals: dict[str, Path], tmp_path: Path, name: str, value: float, stored: torch.dtype
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors.update({key: tensor.to(stored) for key, tensor in tensors.items()})
        spoilt = sorted(key for key in tensors if ".1." in key and key.endswith("layernorm.weight"))[0]
        tensors[spoilt].view(-1)[-1] = value

    with pytest.raises(ModelError, match=r"the weight \S*layernorm.* has values that are not finite"):
        Engine(changed(originals[name], tmp_path, spoil), dtype="bfloat16")


@pytest.mark.parametrize(
    "part", ["embed_tokens", "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "lm_head", "norm"]
)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_weight_of_a_described_model_is_checked(
    originals: dict[str, Path], tmp_path: Path, part: str, dtype: str
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[next(name for name in tensors if f"{part}.weight" in name)].view(-1)[3] = float("nan")

    with pytest.raises(ModelError, match=rf"{tmp_path}.*{part}\.weight has values that are not finite"):
        Engine(changed(originals["llama"], tmp_path, spoil), dtype=dtype)


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 3.4e38), ("int8", 9e6)])
def test_weights_that_a_format_cannot_hold_are_refused(
    originals: dict[str, Path], tmp_path: Path, dtype: str, value: float
) -> None:
    def enlarge(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = -value

    folder = changed(originals["llama"], tmp_path, enlarge)
    with pytest.raises(ModelError, match=rf"up_proj\.weight has a value of magnitude .*{dtype} holds at most"):
        Engine(folder, dtype=dtype)
    Engine(folder, dtype="float32", budget_tokens=64)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1])
def test_blocks_of_gguf_with_scales_that_are_not_finite_are_refused(tmp_path: Path, kind: Kind) -> None:
    file = tiny_gguf.write(tmp_path / "model.gguf", kind=lambda name: Kind.F32 if "norm" in name else kind)
    folder = prepare(file, tmp_path / "models")
    path = folder / "model.gguf"
    content = bytearray(path.read_bytes())
    tensor = GgufFile(path).tensors["blk.1.ffn_up.weight"]
    at = bytes(content).index(tensor.data.tobytes())
    content[at : at + 2] = b"\x00\x7e"  # NaN as float16
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        Engine(folder, dtype="gguf")
    source = tmp_path / "spoilt.gguf"
    source.write_bytes(content)
    with pytest.raises(ModelError, match=r"up_proj\.weight holds values that are not finite"):
        prepare(source, tmp_path / "models")


def test_values_that_overflow_do_not_reach_the_next_session(originals: dict[str, Path], tmp_path: Path) -> None:
    """Finite weights too can give values in the KV cache that are not: here those of token 5."""

    def overflow(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][:, 0] = 0
        tensors["model.embed_tokens.weight"][5] = 0
        tensors["model.embed_tokens.weight"][5, 0] = 1
        tensors["model.layers.0.self_attn.v_proj.weight"][:, 0] = 3e38

    folder = changed(originals["llama"], tmp_path, overflow)
    engine, fresh = (Engine(folder, dtype="float32", budget_tokens=64) for _ in range(2))
    engine.attach("first", [])
    assert not torch.isfinite(engine.forward([Step("first", [9, 9, 5, 5, 5, 5, 5, 5])]).logits).all()
    engine.release("first")
    results = []
    for each in (engine, fresh):
        each.attach("second", [])
        results.append(each.forward([Step("second", [7, 8, 9], 3)]).logits)
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)


@pytest.mark.parametrize("name", MODELS)
def test_missing_and_unknown_weights_are_refused_by_name(originals: dict[str, Path], tmp_path: Path, name: str) -> None:
    for label, change, reason in (
        ("missing", lambda t: [t.pop(key) for key in sorted(t) if ".1." in key and "layernorm" in key], "layernorm"),
        ("unknown", lambda t: t.update({"model.extra.weight": torch.ones(2)}), r"have besides model\.extra\.weight"),
        ("prefixed", lambda t: t.update({f"_orig_mod.{k}": t.pop(k) for k in list(t)}), r"lack .* and \d+ more"),
        ("shape", lambda t: t.update({k: t[k][:1] for k in t if "layers.1.input" in k}), "shape|1, and must be"),
    ):
        folder = tmp_path / label
        folder.mkdir()
        with pytest.raises(ModelError, match=reason):
            Engine(changed(originals[name], folder, change))


def test_tensors_that_older_versions_saved_are_no_unknown_weights(originals: dict[str, Path], tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)

    Engine(changed(originals["gpt-neox"], tmp_path, add), budget_tokens=64)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"head_dim": 10**8}, "100000000 rotated elements"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e-320}}, "angles .* out of range"),
        ({"num_hidden_layers": 10**8}, "100000000 layers"),
        ({"hidden_size": "64"}, "hidden_size '64', not an integer"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq .* not supported"),
    ],
)
def test_a_broken_configuration_is_refused_with_its_reason(
    originals: dict[str, Path], tmp_path: Path, dtype: str, config: dict[str, Any], reason: str
) -> None:
    folder = changed(originals["llama"], tmp_path, **config)
    with pytest.raises(ModelError, match=reason) as refused:
        Engine(folder, dtype=dtype)
    assert "bfloat16" not in str(refused.value).replace("Take the model in bfloat16", "")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_size": 10**6, "num_attention_heads": 1}, r"describes [\d,]+ weights, and the files hold"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers, and the files only"),
        ({"hidden_size": "many"}, "cannot be loaded as a causal language model .model_type gpt_neox"),
    ],
)
def test_a_senseless_configuration_takes_no_memory(
    originals: dict[str, Path], tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        Engine(changed(originals["gpt-neox"], tmp_path, **config))


def test_int8_names_the_way_out_where_there_is_one(originals: dict[str, Path]) -> None:
    with pytest.raises(EngineError, match=r"'gpt_neox' has no description\. With WISP_DTYPE=bfloat16 or float32"):
        Engine(originals["gpt-neox"], dtype="int8")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "brand_new"}, r"model_type 'brand_new' is unknown to transformers [\d.]+\. Name another"),
        (
            {"model_type": "brand_new", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
            r"unknown .*and the folder's own code \(auto_map\) is never run",
        ),
        ({"model_type": "t5"}, r"\(model_type t5\)"),
        ({"model_type": ...}, "model_type None is unknown"),
    ],
)
def test_another_kind_of_model_is_refused_and_no_code_of_the_folder_runs(
    originals: dict[str, Path], tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    folder = changed(originals["gpt-neox"], tmp_path, **config)
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: ...\n")
    with pytest.raises(ModelError, match=reason) as refused:
        Engine(folder)
    assert "trust_remote_code" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def trials_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try models in this process: in one of its own, loading torch takes longer than all else."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        python, *arguments = command
        assert (python, *arguments[:2]) == (sys.executable, "-m", "shared.engine.trial")
        output = io.StringIO()
        with monkeypatch.context() as patch, redirect_stdout(output):
            patch.setattr(sys, "argv", arguments[1:])
            trial.main()
        return subprocess.CompletedProcess(command, 0, output.getvalue(), "")

    monkeypatch.setattr(preparing, "subprocess", SimpleNamespace(run=run))


def test_a_trial_that_is_killed_is_an_error_with_its_status(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ModelFolder(served(originals["gpt-neox"], tmp_path / "served"))
    for errors, last in (("", "no output"), ("first\nlast\n", "last")):
        ended = SimpleNamespace(returncode=-9, stdout="loading\n", stderr=errors)
        monkeypatch.setattr(preparing, "subprocess", SimpleNamespace(run=lambda *_, ended=ended, **__: ended))
        with pytest.raises(ModelError, match=rf"status -9 \({last}\)\. It may need more memory"):
            try_model(folder)


def served(folder: Path, to: Path, change: Callable[[Tensors], object] = lambda tensors: None, **config: Any) -> Path:
    """Return a copy that has a tokenizer."""
    to.mkdir()
    backend = made_folders.byte_level(merges=10)
    assert backend.get_vocab_size() <= tiny.VOCAB
    backend.save(str(to / "tokenizer.json"))
    return changed(folder, to, change, **config)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_tried_once_before_it_is_served(originals: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = served(originals[name], tmp_path / name)
    doings: list[str] = []
    for times in (1, 2):
        assert prepare(folder, tmp_path / "models", lambda doing, share: doings.append(doing)) == folder
        assert len(doings) == (0 if name == "llama" else 2), f"prepared {times} times"


@pytest.mark.usefixtures("trials_here")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (lambda t: [t.pop(key) for key in sorted(t) if "layers.1." in key and "norm" in key], {}, "layernorm"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), {}, r"have besides model\.extra\.weight"),
        (lambda t: None, {"model_type": "brand_new"}, "is unknown to transformers"),
    ],
    ids=["missing", "unknown", "type"],
)
def test_a_folder_that_does_not_load_is_not_prepared(
    originals: dict[str, Path],
    tmp_path: Path,
    name: str,
    change: Callable[[Tensors], object],
    config: dict[str, Any],
    reason: str,
) -> None:
    folder = served(originals[name], tmp_path / name, change, **config)
    with pytest.raises(ModelError, match=reason):
        prepare(folder, tmp_path / "models")


@pytest.mark.usefixtures("trials_here")
def test_the_command_reports_how_a_folder_runs(originals: dict[str, Path], tmp_path: Path) -> None:
    outputs = {}
    for name, config in (("llama", {}), ("gpt-neox", {}), ("mixtral", {"model_type": "brand_new"})):
        folder = served(originals[name], tmp_path / name, **config)
        outputs[name] = CliRunner().invoke(app, ["models", "check", str(folder)])
    assert "runs in bfloat16.\nComputed by: compiled code.\nExact: " in outputs["llama"].output
    assert "transformers' module code, which is slower (model type 'gpt_neox' has no" in outputs["gpt-neox"].output
    assert outputs["mixtral"].exit_code == 1
    assert "model_type 'brand_new' is unknown to transformers" in outputs["mixtral"].output
    refused = CliRunner().invoke(app, ["models", "check", str(tmp_path / "gpt-neox"), "--dtype", "int8"])
    assert (refused.exit_code, "int8 weights need the compiled pass" in refused.output) == (1, True)


def test_a_model_that_crashes_is_refused_by_its_type(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: object, **options: object) -> None:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(module_pass.ModulePass, "__init__", crash)
    with pytest.raises(ModelError, match=r"model_type gpt_neox \(IndexError: tuple index .*Name another model"):
        Engine(originals["gpt-neox"])
