"""The source of the attention kernel fixes its bits: no compilation of it may choose others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from numba import cfunc, types

from shared.engine import kernel

pytestmark = pytest.mark.slow

RELAXED = re.compile(r"^\s*%\S+ = .*?\b(fast|contract|reassoc|arcp|afn|nnan|ninf|nsz)\b.*", re.MULTILINE)
"""An instruction by which the compiler may change bits, in LLVM's notation."""

DIGEST = """
import hashlib
import torch
from shared.engine.attention import BlockCache, PackedBatch, KvShape

random = torch.Generator().manual_seed(1)
digest = hashlib.sha256()
for dtype in (torch.bfloat16, torch.float32):
    cache = BlockCache(KvShape(layers=1, kv_heads=3, heads=9, head_size=64), 8, dtype, threads=1)
    start = 0
    for count in (130, 1, 9, 1, 40):
        q, k, v = (torch.randn(count, heads, 64, generator=random).to(dtype) for heads in (9, 3, 3))
        cache.begin(PackedBatch([list(range(8))], [start], [count]))
        digest.update(cache.attend(0, q, k, v, 0.125, 0).view(torch.uint8).numpy().tobytes())
        start += count
print(digest.hexdigest())
"""


def digest(numba_cache: Path) -> str:
    """Return the result of a new process that keeps its compiled code in this folder."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(numba_cache)}
    done = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_process_that_compiled_it_computes_what_one_computes_that_loaded_it(tmp_path: Path) -> None:
    compiled = digest(tmp_path)
    kept = list(tmp_path.rglob("*.nbc"))
    loaded = digest(tmp_path)
    assert kept
    assert list(tmp_path.rglob("*.nbc")) == kept, "the second process compiled nothing"
    assert compiled == loaded


@pytest.mark.parametrize("source", [kernel.attend_bfloat16, kernel.attend_float32])
def test_no_instruction_lets_the_compiler_choose_the_bits(source: object) -> None:
    code = cfunc(types.void(types.CPointer(types.int64)))(source).inspect_llvm()
    assert [found.group() for found in RELAXED.finditer(code)] == []
    assert "@llvm.fma.v" in code, "it is vectorised"
