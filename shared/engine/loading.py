"""Loading of a model folder as transformers' module code, with every weight from the files and none made up."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging

from shared.engine.masks import NAME
from shared.engine.weights import as_matrix
from shared.errors import ModelError
from shared.kernels.finite import require_finite
from shared.models.weight_files import StoredTensor, read_config, refuse_quantized, some_names, stored_tensors

COMPUTED: Final = re.compile(r"\.(inv_freq|masked_bias)$")
"""Names of tensors that older versions of transformers saved, and newer ones compute."""
OTHER_SENSES: Final = re.compile(r"(^|[._])(vision|visual|image|audio|video|multi_modal|speech)")
"""Names of the parts of a multimodal model that read no text."""
ROOM: Final = 1.5
"""A model has at most this many times the values of its files, whose tied weights are stored once."""


def load(folder: Path, dtype: torch.dtype, torch_device: torch.device) -> Any:
    """Return the model in a folder for a device, with our attention function. Raises ModelError.

    Runs no code of the folder. Refuses weights that are missing, of another shape, unknown, quantized, or not finite.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), stored_tensors(folder)
    refuse_quantized(folder, config, tensors)
    with _refusals(folder, config):
        auto_class = _require_sizes(folder, tensors)
        # Grouped products of experts sum in an order that depends on the groups.
        experts = {"experts_implementation": "eager"} if torch_device.type == "cpu" else {}
        loaded: Any = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=NAME,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report
            **experts,
        )
    model, report = loaded
    _require_all(folder, config, report)
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{folder}: {type(model).__name__} (model_type {config.get('model_type')}) cannot restrict its logits to "
            "some rows (logits_to_keep), which serving needs. Name another model's folder."
        )
    _drop_other_parts(model)
    try:
        for name, values in (*model.named_parameters(), *model.named_buffers()):
            if values.is_floating_point() and (values.requires_grad or name.endswith("inv_freq")):
                require_finite(name, as_matrix(values.detach()))
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    return model.eval()


@contextmanager
def _refusals(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Raise ModelError, with the type of the model and the reason, for anything that transformers raises."""
    progress = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # a model's code can raise anything
        kind = config.get("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            code = ", and the folder's own code (auto_map) is never run" if "auto_map" in config else ""
            raise ModelError(
                f"{folder}: model_type {kind!r} is unknown to transformers {transformers.__version__}{code}. "
                "Name another model's folder."
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError) and error.args == (NAME,):
            raise ModelError(
                f"{folder}: models of type {kind} cannot be served: their attention does not go through transformers' "
                "AttentionInterface. Name another model's folder."
            ) from error
        raise ModelError(
            f"{folder} cannot be loaded as a causal language model (model_type {kind}): {reason[:300]}. "
            "Download the model again, or name another model's folder."
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _drop_other_parts(model: Any) -> None:
    """Free the weights that texts do not use, as those of images."""
    base, decoder = model.base_model, model.get_decoder()
    if decoder is None or decoder is base:
        return
    for name, part in list(base.named_children()):
        if decoder not in part.modules() and any(True for _ in part.parameters()):
            setattr(base, name, None)


def _require_sizes(folder: Path, tensors: Mapping[str, StoredTensor]) -> Any:
    """Return the class that loads a model: of texts, or of images and texts for its text part.

    Raises ModelError if config.json describes a much larger model than the files hold, before memory is taken.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if layers > len(tensors):
        raise ModelError(
            f"{folder}: config.json has {layers} layers, and the files only {len(tensors)} tensors. Download the model "
            "again."
        )
    is_of_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class: Any = AutoModelForCausalLM
    if is_of_images and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto_class = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=False)
    described = sum(weight.numel() for weight in model.parameters())
    stored = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
    if described > ROOM * stored:
        raise ModelError(
            f"{folder}: config.json describes {described:,} weights, and the files hold {stored:,}. Download the model "
            "again."
        )
    return auto_class


def _require_all(folder: Path, config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Raise ModelError unless the files have the model's weights and no others. transformers would give those missing
    random values, and pass over unknown ones."""
    missing = sorted({str(each) for each in report["missing_keys"]})
    mismatched = sorted({str(each[0] if isinstance(each, tuple) else each) for each in report["mismatched_keys"]})
    unknown = sorted(
        name
        for name in map(str, report["unexpected_keys"])
        if not COMPUTED.search(name) and not (_reads_more_than_text(config) and OTHER_SENSES.search(name))
    )
    wrong = [
        f"{verb} {some_names(names)}"
        for verb, names in (("lack", missing), ("have in another shape", mismatched), ("have besides", unknown))
        if names
    ]
    if wrong or report.get("error_msgs"):
        wrong += [" ".join(str(message).split())[:200] for message in report.get("error_msgs") or ()]
        raise ModelError(
            f"{folder}: its files are not those of the model that config.json describes ({config.get('model_type')}): "
            f"they {'; they '.join(wrong)}. Download the model again; if it is another's adapter or a part, merge it "
            "first."
        )


def _reads_more_than_text(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("text_config"), Mapping)
