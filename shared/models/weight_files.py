"""Weights of a model folder in safetensors: the files, and names, types and shapes of their tensors. Reads no values.

Files that would load as another model are refused with a reason: files cut short or not downloaded, adapters, and
quantized weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from shared.errors import ModelError

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
FLOATS: Final = ("BF16", "F16", "F32", "F64")
"""Types of safetensors that hold weights as they are."""
SIZES: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes of a value, by type."""
SCALES: Final = ("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "qzeros", "scales", "SCB", "absmax")
"""Last parts of names that only quantized weights have beside them."""
QUANTIZED_BY: Final = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside config.json with which NVIDIA's ModelOpt, AutoGPTQ and AutoAWQ describe their weights."""
OTHER_FORMATS: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.npz", "*.onnx")
AGAIN: Final = "Download the model again."
UNQUANTIZED: Final = "Take the model in bfloat16, float16 or float32; WISP_DTYPE=int8 quantizes it when it is loaded."
_POINTER: Final = b"version https://git-lfs"
_LONGEST_HEADER: Final = 100_000_000
"""As in the safetensors library."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place and form."""

    file: Path
    type: str
    """As safetensors writes it, such as BF16."""
    shape: tuple[int, ...]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files with the folder's weights, which may be missing: the index's, or model.safetensors.

    Raises ModelError if the index cannot be read.
    """
    if not (folder / INDEX).is_file():
        return (folder / SINGLE,)
    names = set(_index(folder).values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{folder / INDEX} names {name!r}, which is no file of the folder. {AGAIN}")
    return tuple(folder / name for name in sorted(names))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the folder by name. Raises ModelError if a file is missing, incomplete or unreadable."""
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        require_weight_file(path)
        tensors |= _tensors(path)
    if not tensors:
        raise ModelError(f"{folder} has no tensor in its safetensors files. {AGAIN}")
    if (folder / INDEX).is_file():
        index = _index(folder)
        for name, file in index.items():
            if name not in tensors or tensors[name].file.name != file:
                raise ModelError(f"{folder / file} lacks the tensor {name}, which {INDEX} places there. {AGAIN}")
    return tensors


def require_weight_file(path: Path) -> None:
    """Raise ModelError if the file is missing; the message names what the folder has in its place."""
    if path.is_file():
        return
    folder = path.parent
    if list(folder.glob("adapter_*")):
        raise ModelError(
            f"{folder} holds a PEFT adapter and no model ({path.name} is missing). Merge it into its base model "
            "(PEFT's merge_and_unload, then save_pretrained), and give the merged model's folder."
        )
    for pattern in ("*.gguf", *OTHER_FORMATS):
        if found := sorted(folder.glob(pattern)):
            advice = (
                "give the path of that file instead."
                if pattern == "*.gguf"
                else "download the model's safetensors files, or convert it: load it with transformers and call "
                "save_pretrained(FOLDER)."
            )
            raise ModelError(f"{folder} has no {path.name}, only {found[0].name}: {advice}")
    raise ModelError(
        f"{folder} lacks {path.name}. A model folder needs config.json, safetensors weights and tokenizer.json: "
        "download the model again in full, or name another folder."
    )


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raise ModelError for a file that begins as what git leaves in place of a large file."""
    if beginning.startswith(_POINTER):
        raise ModelError(
            f"{path} is a pointer of git-lfs, not the file itself. Run `git lfs pull` in the folder, or download the "
            "model with `hf download OWNER/NAME --local-dir FOLDER`."
        )


def refuse_quantized(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ModelError for quantized weights, whether a configuration mentions them or not, and for adapters'.

    No method of quantization is supported: transformers needs other packages or a GPU for nearly all of them, and
    passes over the scales of those unknown to it.
    """
    if method := _declared_method(folder, config):
        raise ModelError(f"{folder}: the weights are quantized by {method}, which is not supported. {UNQUANTIZED}")
    for name, tensor in tensors.items():
        if name.startswith("base_model.model.") or ".lora_A." in name or ".base_layer." in name:
            raise ModelError(
                f"{folder}: {name} is a tensor of a PEFT adapter, whose names are not the model's. Merge it "
                "(PEFT's merge_and_unload, then save_pretrained), and give the merged model's folder."
            )
        is_scale = name.rpartition(".")[2] in SCALES
        if is_scale or (name.endswith("weight") and tensor.type not in FLOATS):
            raise ModelError(
                f"{folder}: the tensor {name} ({tensor.type}) is of quantized weights, and config.json has no "
                f"quantization_config. {UNQUANTIZED}"
            )


def some_names(names: Iterable[str], most: int = 3) -> str:
    """Return names for a message: a few, and the number of the others."""
    ordered = sorted(names)
    more = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {more} more" if more > 0 else "")


def _declared_method(folder: Path, config: Mapping[str, Any]) -> str | None:
    text = config.get("text_config")
    for each in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if (declared := each.get(key)) is not None:
                method = declared.get("quant_method") if isinstance(declared, Mapping) else None
                return f"{method or 'an unnamed method'} ({key} of config.json)"
    for name in QUANTIZED_BY:
        if not (folder / name).is_file():
            continue
        described = read_json(folder / name)
        inner = described.get("quantization", described)
        algorithm = inner.get("quant_algo", inner.get("quant_method", "")) if isinstance(inner, Mapping) else ""
        if algorithm is not None:
            return f"{algorithm or 'an unnamed method'} ({name})"
    return None


def _index(folder: Path) -> dict[str, Any]:
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{folder / INDEX} has no weight_map with tensors. {AGAIN}")
    return names


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json. Raises ModelError."""
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ModelError."""
    try:
        content = path.read_bytes()
        refuse_pointer(path, content)
        values = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read ({error}). {AGAIN}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object. {AGAIN}")
    return values


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file: 8 bytes with the header's length, the header as JSON, and the values."""
    try:
        with path.open("rb") as file:
            beginning = file.read(100)
            refuse_pointer(path, beginning)
            size, length = path.stat().st_size, int.from_bytes(beginning[:8], "little")
            if len(beginning) < 8 or 8 + length > size:
                raise ValueError(f"it has {size:,} bytes, and ends in its header")
            if length > _LONGEST_HEADER:
                raise ValueError("it is no safetensors file")
            file.seek(8)
            header = json.loads(file.read(length))
        return dict(_checked(path, header, size - 8 - length))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} can't be read as safetensors ({error}). {AGAIN}") from error


def _checked(path: Path, header: Any, room: int) -> Iterable[tuple[str, StoredTensor]]:
    """Yield the header's tensors. room: bytes of the values. Raises one of the errors of reading."""
    furthest = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if kind in SIZES and stop - start != SIZES[kind] * prod(shape):
            raise ValueError(f"the tensor {name} of {kind} has the shape {shape} and {stop - start} bytes")
        furthest = max(furthest, stop)
        yield name, StoredTensor(path, kind, shape)
    if furthest != room:
        raise ValueError(f"its values have {room:,} bytes, and must have {furthest:,}: it is incomplete")
