"""A model of a given architecture with random weights, for measurements: time does not depend on the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Any

from shared.errors import ModelError
from shared.models.weight_files import INDEX

if TYPE_CHECKING:
    import torch

PATTERN = 1 << 16
"""Random numbers that fill the matrices in turn: drawing billions would take minutes."""
SPREAD = 0.02
SHARD_BYTES = 4 << 30
IN_MEMORY = Path("/dev/shm")


@contextmanager
def roomy_folder(prefix: str) -> Iterator[Path]:
    """Yield a temporary folder, in the memory if that has more room than the disk: models take gigabytes."""
    places = [Path(gettempdir())] + ([IN_MEMORY] if IN_MEMORY.is_dir() else [])
    with TemporaryDirectory(prefix=prefix, dir=max(places, key=lambda place: shutil.disk_usage(place).free)) as made:
        yield Path(made)


def random_model(config: Path, to: Path) -> int:
    """Write a folder with the architecture of a config.json and random bfloat16 weights; return their number.

    Raises ModelError if transformers cannot make such a model.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    to.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, to / "config.json")
    try:
        made: Any = AutoConfig.from_pretrained(to, local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    except Exception as error:  # a model's code can raise anything
        raise ModelError(f"{config}: transformers makes no causal language model of it ({error})") from error
    noise = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).bfloat16()
    shapes, seen = dict[str, torch.Size](), set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) not in seen:  # else tied to another one
            seen.add(id(weight))
            shapes[name] = weight.shape
    needed, free = 2 * sum(shape.numel() for shape in shapes.values()), shutil.disk_usage(to).free
    if needed > free:
        raise ModelError(f"{config}: its weights take {needed / 1e9:.0f} GB, and {to} has {free / 1e9:.0f} GB left")
    places: dict[str, str] = {}
    shards = list(_shards(shapes))
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file({name: _filled(shapes[name], name, noise) for name in names}, to / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (to / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return needed // 2


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Yield names of weights that share a file: all of a model would be in memory twice."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        names.append(name)
        size += 2 * shape.numel()
        if size >= SHARD_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def _filled(shape: Sequence[int], name: str, noise: torch.Tensor) -> torch.Tensor:
    import torch

    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    count = torch.Size(shape).numel()
    return noise.repeat(-(-count // len(noise)))[:count].view(*shape).contiguous()
