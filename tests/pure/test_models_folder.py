"""Model folders: the facts read from them, what is refused, and what their fingerprints depend on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import tokenizers
from made_folders import byte_level, write_folder, write_llama
from typer.testing import CliRunner

from services.tools.cli.main import app
from shared.errors import ModelError
from shared.models.folder import ModelFolder
from shared.models.generation import SamplingDefaults
from shared.models.prepare import prepare
from shared.models.text import Tokenizer


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return byte_level()


@pytest.fixture
def folder(tmp_path: Path, backend: tokenizers.Tokenizer) -> Path:
    return write_folder(tmp_path / "model", backend)


def test_the_facts_of_a_folder_come_from_its_configuration(folder: Path) -> None:
    model = ModelFolder(folder)
    assert (model.name, model.max_len, model.eos_ids, model.bos_id) == ("model", 64, (1,), None)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "bos_token_id": 0}')
    model = ModelFolder(folder)
    assert (model.eos_ids, model.bos_id) == ((1, 2), 0)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": None}, {}, (1,)),
        ({"eos_token_id": None, "bos_token_id": None}, {"eos_token_id": [2, 3]}, (2, 3, 1)),
        ({"eos_token_id": 7}, {"eos_token_id": 3}, (7, 1)),
        ({}, {"eos_token_id": None, "text_config": {"eos_token_id": 5}}, (5, 1)),
        ({}, {"eos_token_id": None}, (1,)),
    ],
)
def test_ids_that_end_a_text_come_from_every_file(
    folder: Path, generation: dict[str, Any], config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    """The last is the tokenizer's own, whose id is 1."""
    (folder / "generation_config.json").write_text(json.dumps(generation))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    assert ModelFolder(folder).eos_ids == expected


def test_special_tokens_have_a_file_of_their_own(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 999, "max_position_embeddings": 64}))
    assert ModelFolder(folder).eos_ids == ()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    model = ModelFolder(folder)
    assert (model.eos_ids, model.special_token("eos_token")) == ((1,), "<|im_end|>")
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": "{{ messages[0].content }}{{ eos_token }}"})
    )
    assert Tokenizer(ModelFolder(folder)).render_chat([{"role": "user", "content": "b"}])[-1] == 1


def test_the_template_in_a_file_of_its_own_comes_first(folder: Path) -> None:
    templates = {"chat_template.jinja": "a", "chat_template.json": json.dumps({"chat_template": "b"})}
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": "c"}]}))
    assert ModelFolder(folder).chat_template == "c"
    for name, expected in (("chat_template.json", "b"), ("chat_template.jinja", "a")):
        (folder / name).write_text(templates[name])
        assert ModelFolder(folder).chat_template == expected


@pytest.mark.parametrize("eos", ["</s>", [1, "2"], 1.5, {"id": 1}])
def test_an_id_that_is_no_integer_is_refused(folder: Path, eos: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ModelError, match=r"eos_token_id is .*, not a token id or a list of them"):
        _ = ModelFolder(folder).eos_ids


def test_generation_config_proposes_a_sampling(folder: Path) -> None:
    assert ModelFolder(folder).sampling == SamplingDefaults()
    proposed = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(proposed))
    assert ModelFolder(folder).sampling == SamplingDefaults(0.6, 0.95, 20)


@pytest.mark.parametrize(
    "proposed", [{"temperature": "hot"}, {"temperature": -1}, {"top_p": 1.5}, {"top_k": 2.5}, {"top_k": True}]
)
def test_a_sampling_out_of_range_is_refused(folder: Path, proposed: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(proposed))
    with pytest.raises(ModelError, match=rf"has {next(iter(proposed))} .*WISP_GENERATION_CONFIG=ignore"):
        _ = ModelFolder(folder).sampling


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"model_type": "gpt2", "n_positions": 128, "n_ctx": 64, "vocab_size": 999}, (999, 128)),
        ({"model_type": "mpt", "max_seq_len": 96, "vocab_size": 999}, (999, 96)),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, (262208, 131072)),
        ({"model_type": "llava", "text_config": {"vocab_size": 7, "max_position_embeddings": 8}}, (7, 8)),
    ],
)
def test_facts_have_other_names_places_and_defaults(
    folder: Path, config: dict[str, Any], facts: tuple[int, int]
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert (ModelFolder(folder).vocab_size, ModelFolder(folder).max_len) == facts


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_refused_by_name(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=rf"lacks {missing}.*download the model again"):
        ModelFolder(folder)


def test_a_description_tells_the_same_without_the_weights(folder: Path, tmp_path: Path) -> None:
    model = ModelFolder(folder)
    model.describe(tmp_path / "described" / "model")
    described = ModelFolder(tmp_path / "described" / "model")
    assert described.fingerprint("bfloat16") == model.fingerprint("bfloat16")
    assert (described.name, described.max_len, described.vocab_fingerprint) == (
        model.name,
        model.max_len,
        model.vocab_fingerprint,
    )
    model.require_weights()
    with pytest.raises(ModelError, match="without its weights, which only a gateway can use"):
        described.require_weights()
    # Weights that are there count, not what was once said of them.
    (described.path / "model.safetensors").write_bytes(b"other")
    assert ModelFolder(described.path).fingerprint("bfloat16") != model.fingerprint("bfloat16")


def test_a_missing_shard_is_refused_by_name(folder: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"1")
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors"):
        ModelFolder(folder)


@pytest.mark.parametrize("command", [["up", "--port", "0", "--target"], ["models", "prepare"], ["models", "check"]])
def test_commands_refuse_a_bad_sampling_before_anything_starts(
    command: list[str], tmp_path: Path, backend: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> NoReturn:
        raise AssertionError("started")

    folder = write_llama(tmp_path / "model", backend)
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    monkeypatch.setattr("services.tools.local.brokers.Brokers.start", started)
    monkeypatch.setattr("shared.models.prepare.try_model", started)
    result = CliRunner().invoke(app, [*command, str(folder)], catch_exceptions=False)
    assert result.exit_code == 1
    assert "generation_config.json has temperature 'hot', not a number" in result.stderr
    assert "WISP_GENERATION_CONFIG=ignore" in result.stderr
    ignored = {"WISP_GENERATION_CONFIG": "ignore"}
    assert CliRunner().invoke(app, ["models", "prepare", str(folder)], env=ignored).exit_code == 0


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_configuration_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json.*Download the model again"):
        ModelFolder(folder)


def test_a_folder_is_prepared_by_leaving_it_where_it_is(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    folder = write_llama(tmp_path / "model", backend)
    assert prepare(folder, tmp_path / "models") == folder
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"vocab_size": 4}, "different models"),
        ({"eos_token_id": 10**6}, "outside the vocabulary"),
        ({"max_position_embeddings": None}, "only causal language models"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(
    tmp_path: Path, backend: tokenizers.Tokenizer, config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ModelError, match=problem):
        prepare(write_folder(tmp_path, backend, **config), tmp_path / "models")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by awq"),
        ({"head_dim": 10**8}, "100000000 rotated elements of a head"),
        ({"num_hidden_layers": 2000}, "has 2000 layers, the folder only 11 tensors"),
        ({"intermediate_size": 8, "num_key_value_heads": 2}, r"k_proj\.weight is 4 x 8, and must be 8 x 8"),
    ],
)
def test_a_folder_that_nothing_can_compute_is_refused(
    tmp_path: Path, backend: tokenizers.Tokenizer, config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ModelError, match=problem):
        prepare(write_llama(tmp_path, backend, **config), tmp_path / "models")


def test_a_folder_cut_short_is_refused_before_it_is_served(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    folder = write_llama(tmp_path, backend)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ModelError, match="incomplete"):
        prepare(folder, tmp_path / "models")


def test_a_name_that_is_no_folder_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"smollm2-135m-instruct.*hf download"):
        prepare("org/model", tmp_path)


def _new_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"Weights")


def _new_tokenizer(folder: Path) -> None:
    byte_level(merges=10).save(str(folder / "tokenizer.json"))


def _new_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))


@pytest.mark.parametrize("change", [_new_weights, _new_tokenizer, _new_config])
@pytest.mark.parametrize("old", [False, True])
def test_the_fingerprint_changes_with_the_computation(folder: Path, change: Callable[[Path], None], old: bool) -> None:
    if old:  # long enough ago that the digest of the weights is kept in the folder
        os.utime(folder / "model.safetensors", (time.time() - 60, time.time() - 60))
    before = ModelFolder(folder).fingerprint("bfloat16")
    assert before == ModelFolder(folder).fingerprint("bfloat16") != ModelFolder(folder).fingerprint("float32")
    change(folder)
    assert ModelFolder(folder).fingerprint("bfloat16") != before


def test_the_digest_of_settled_weights_is_not_computed_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(folder / "model.safetensors", (time.time() - 60, time.time() - 60))
    first = ModelFolder(folder).fingerprint("bfloat16")
    monkeypatch.delattr("hashlib.file_digest")
    assert ModelFolder(folder).fingerprint("bfloat16") == first


def test_the_vocabulary_fingerprint_depends_on_ids_and_tokens_only(
    folder: Path, tmp_path: Path, backend: tokenizers.Tokenizer
) -> None:
    other = write_folder(tmp_path / "draft", backend, template=None, max_position_embeddings=99)
    (other / "model.safetensors").write_bytes(b"others")
    assert ModelFolder(other).vocab_fingerprint == ModelFolder(folder).vocab_fingerprint
    _new_tokenizer(other)
    assert ModelFolder(other).vocab_fingerprint != ModelFolder(folder).vocab_fingerprint


def test_reading_a_model_needs_neither_torch_nor_numpy(folder: Path) -> None:
    program = (
        "import sys; from shared.models.folder import ModelFolder; from shared.models.text import Tokenizer\n"
        "import shared.models.stop\n"
        f"folder = ModelFolder({str(folder)!r}); folder.fingerprint('bfloat16')\n"
        "Tokenizer(folder).render_chat([{'role': 'user', 'content': 'hi'}])\n"
        "sys.exit(','.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or None)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
