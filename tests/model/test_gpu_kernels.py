"""Single kernels for GPUs: roundings, and compilation for GPUs that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from import_graph import ROOT
from tiny_families import FAMILIES

pytest.importorskip("triton")

from gpu_model import gpu_decoder

from shared.gpu_kernels import source
from shared.gpu_kernels.launches import launch

COMPILE = """
import sys, torch, json
from pathlib import Path
from gpu_model import gpu_decoder
from gpu_variants import VariantRecorder, compile_variant
from services.tools.bench.gpu.random_models import RandomModel, configuration
from shared.gpu_kernels.decoder import GpuDecoder
from shared.kernels.cache import PackedBatch

folder, form, capabilities = json.loads(sys.argv[1])
found = []
recorder = VariantRecorder()
if folder == "qwen3-8b":
    model = RandomModel(configuration(folder, 1) | {"vocab_size": 1024})
    meta = torch.device("meta")
    decoder = GpuDecoder(model.description, model.read, form=form, blocks=8, torch_device=meta, launcher=recorder)
else:
    decoder = gpu_decoder(Path(folder), form, on="meta", launcher=recorder)
for wide, joins in ((False, True), (True, False)):
    decoder.wide_tiles, decoder.joins_runs = wide, joins
    decoder.forward(PackedBatch([[0, 1]], [0], [70]), tokens=[1] * 70, wanted=range(70))
for variant in recorder.variants:
    for capability in capabilities:
        compiled = compile_variant(variant, capability)
        found.append([variant.kernel, compiled.ptx, compiled.code_bytes, compiled.shared_bytes])
print(json.dumps(found))
"""
SMALLEST_SHARED_MEMORY = 99 * 1024
"""Shared memory that a program can have on GPUs of capability 8.6 and 8.9."""


def all_kernels() -> set[str]:
    """Return the names of all kernels of the project that are launched, by their sources."""
    sources = [path.read_text("utf-8") for folder in ("shared", "services") for path in (ROOT / folder).rglob("*.py")]
    found = [name for text in sources for name in re.findall(r"^@triton\.jit.*\ndef (\w+)", text, re.MULTILINE)]
    assert len(found) > 10
    return {name for name in found if not name.startswith("_")}


def test_values_are_rounded_to_the_nearest_bfloat16() -> None:
    """The carry of a mantissa into the exponent included, which Triton's interpreter itself gets wrong."""
    values = torch.tensor([[1.999, -3.9999, 1.00390625, 1.01171875, 0.0, -0.0, 65503.9, 1e-30]])
    x, out = values.clone(), torch.zeros(1, 64, dtype=torch.bfloat16)
    launch(
        source.add_and_norm, (1,), x, x, x, x, out, x,
        SIZE=8, X_STRIDE=8, ADDED_STRIDE=0, NORMED_STRIDE=64, WIDTH=8, ADDS=False, POST_NORMS=False, NORMS=False,
        KEEPS=False, MULTIPLIER=1.0, POST_EPS=0.0, EPS=0.0,
    )  # fmt: skip
    assert torch.equal(out[:, :8], values.bfloat16())


def test_a_row_has_the_same_bits_at_every_place_of_a_tile(family: Callable[[str], Path]) -> None:
    decoder = gpu_decoder(family("qwen3"), "bfloat16")
    product = decoder.products()[0]
    row = torch.randn(product.depth, generator=torch.Generator().manual_seed(3)).bfloat16()
    x = torch.randn(64, product.depth).bfloat16()
    expected = None
    for place in (0, 5, 15, 16, 63):
        x[place] = row
        out = decoder.multiply_rows(product, x)[place]
        expected = out if expected is None else expected
        assert torch.equal(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form", "capabilities"),
    [("qwen3-8b", "bfloat16", [80, 90]), ("gemma2", "float16", [80, 90]), ("llama", "float32", [80, 90])],
)
def test_every_kernel_compiles_without_a_device(
    name: str, form: str, capabilities: list[int], family: Callable[[str], Path], tmp_path: Path
) -> None:
    """For capabilities 8.0 and 9.0: without sums by atomics, TF32 or contraction. One serves batches of all sizes."""
    model = str(family(name)) if name in FAMILIES else name
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps([model, form, capabilities])],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {kernel for kernel, *_ in found} == all_kernels()
    for kernel, ptx, code_bytes, shared_bytes in found:
        assert code_bytes > 0
        assert shared_bytes <= SMALLEST_SHARED_MEMORY, kernel
        assert not re.search(r"tf32|\b(atom|red)\.", ptx), kernel
        multiplies = kernel in ("multiply", "multiply_gated", "attend")
        assert ("mma" in ptx) == (multiplies and form != "float32"), kernel  # tensor cores
        if form != "float32" or not multiplies:
            assert "fma.rn.f32" not in ptx, kernel
