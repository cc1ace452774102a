"""The source of the kernels fixes their bits: no compilation, level of CPU or number of threads may choose others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
from tiny_families import FAMILIES

from shared.kernels import native
from shared.kernels.source.relaxed import relaxed
from shared.models.prepare import prepare

pytestmark = pytest.mark.slow

EMIT = """
import sys
from pathlib import Path
from shared.kernels.source.__main__ import main, run_function
(compiled,) = run_function.overloads.values()
Path(sys.argv[1]).write_text(compiled.library.get_llvm_str())
main()
"""

RELAXED = """
  %a = fadd float %b, %c
  %d = call <8 x float> @llvm.fma.v8f32(<8 x float> %e, <8 x float> %f, <8 x float> %g)
  %h = fmul fast <8 x float> %e, %f
  %i = tail call contract float @llvm.fma.f32(float %b, float %c, float %a)
  %j = fcmp nnan olt float %a, %b
"""

DIGESTS = """
import hashlib, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from shared.engine import Engine, Step
from shared.kernels import native
from shared.models.folder import ModelFolder
native.level = lambda: sys.argv[1]
FORMS = ("float32", "bfloat16", "int8")  # of a folder without a tokenizer
found = {}
for name, folder in json.loads(sys.argv[3]).items():
    for form in ModelFolder(Path(folder)).dtypes if (Path(folder) / "tokenizer.json").is_file() else FORMS:
        engine = Engine(Path(folder), dtype=form, budget_tokens=512)
        digest = hashlib.sha256()
        engine.attach("s", [])
        vocabulary = min(500, engine.vocab_size)
        for count in (90, 1, 5, 9, 1, 30):
            logits = engine.forward([Step("s", [7 * i % vocabulary for i in range(count)], count)]).logits
            digest.update(logits.contiguous().view(torch.uint8).numpy().tobytes())
        found[f"{name}-{form}"] = digest.hexdigest()[:16]
print(json.dumps(found))
"""


def test_relaxed_instructions_are_found() -> None:
    """A compilation with one fails, so that no level has one."""
    assert [line.split()[0] for line in relaxed(RELAXED)] == ["%h", "%i", "%j"]


def test_products_are_computed_in_vectors_and_no_bits_are_free(tmp_path: Path) -> None:
    """The least level is compiled here, and kept for the comparison of all."""
    least = list(native.levels())[-1]
    environment = os.environ | {"NUMBA_CPU_NAME": least, "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, "-c", EMIT, str(tmp_path / "code.ll")]
    compiled = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    code = (tmp_path / "code.ll").read_text()
    assert "@llvm.fma.v8f32" in code
    assert relaxed(code) == []
    native.folders()[0].mkdir(parents=True, exist_ok=True)
    native._write(native.folders()[0] / native._file(least), compiled)


def digests(level: str, folders: dict[str, Path]) -> dict[str, str]:
    """Return digests of logits by model and format, from a process that runs the code of this level."""
    named = json.dumps({name: str(folder) for name, folder in folders.items()})
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, level, str(Path(__file__).parents[2]), named],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_every_level_of_cpu_computes_the_same_bits(tmp_path: Path) -> None:
    folders = {name: FAMILIES[name](tmp_path / name) for name in ("llama-biases", "gemma2", "olmo2", "phi3-partial")}
    # Blocks of every type, and the formats that they are expanded to.
    folders["gguf"] = prepare(tiny_gguf.write(tmp_path / "tiny.gguf"), tmp_path / "models")
    best, *others = list(native.levels())[list(native.levels()).index(native.level()) :]
    expected = digests(best, folders)
    assert len(set(expected.values())) == len(expected) == 16
    for level in others:
        assert digests(level, folders) == expected, level


@pytest.mark.big_model
def test_this_machine_computes_the_bits_that_others_did(target_folder: Path) -> None:
    assert digests(native.level(), {"smollm2": target_folder}) == {
        "smollm2-float32": "d1d32915780a0571",
        "smollm2-bfloat16": "c6328e6388e2ec39",
        "smollm2-int8": "d601315883b484c0",
        "smollm2-gguf": "2131b2f12e9f6ff1",
    }
