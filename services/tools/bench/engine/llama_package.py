"""llama-cpp-python in a folder of its own, `.wisp/llama`, and GGUF files for it.

The package is compiled on installation and needed by one benchmark only, so it is no part of the environment.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from services.tools.bench.engine.arms import EngineArm
from services.tools.local.folder import checkout, state_folder
from services.tools.local.progress import Progress
from shared.errors import SettingsError
from shared.models.prepare import PACKAGED

REQUIREMENTS = ("llama-cpp-python==0.3.36", "diskcache==5.6.3")
"""The package, and the one of its dependencies that the environment does not have."""
CMAKE_ARGS = ("-DGGML_NATIVE=ON", "-DLLAVA_BUILD=OFF")
"""Compile for this machine's instructions, without the support for images."""
WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""llama.cpp's code for AMX ends with a segmentation fault (at `ldtilecfg`) where it was tried."""
MISSING = (
    f"llama.cpp is not measured: {REQUIREMENTS[0]} is not installed; `wisp bench engine --install-llama` compiles it "
    "into .wisp/llama (needs a C++ compiler; 10 to 20 minutes on two cores)"
)


def package_folder() -> Path:
    """Return the folder to add to the module path."""
    return state_folder() / "llama"


def installed() -> bool:
    """Return whether the required version is installed."""
    name, _, wanted = REQUIREMENTS[0].partition("==")
    return (package_folder() / f"{name.replace('-', '_')}-{wanted}.dist-info").is_dir()


def install(progress: Progress) -> None:
    """Compile and install the package. Raises SettingsError."""
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        raise SettingsError(
            "llama-cpp-python is compiled and needs a C++ compiler; on Debian or Ubuntu: "
            "sudo apt-get install -y build-essential"
        )
    partial, log = package_folder().with_name("llama.partial"), state_folder() / "llama.log"
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--progress-bar", "off", "--verbose"]
    command += ["--no-deps", "--target", str(partial), *REQUIREMENTS]
    flags = [f"-DCMAKE_{language}_FLAGS={WITHOUT_AMX}" for language in ("C", "CXX") if platform.machine() == "x86_64"]
    environment = {"CMAKE_ARGS": shlex.join([*CMAKE_ARGS, *flags]), **os.environ}
    with progress.step(f"compiling {REQUIREMENTS[0]}") as step, log.open("w") as written:
        process = subprocess.Popen(
            command, cwd=checkout(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            written.write(line)
            if line.strip().startswith("["):  # the number of the compiled file
                step.detail(line.strip().partition("]")[0] + "]")
        if process.wait():
            raise SettingsError(f"{REQUIREMENTS[0]} cannot be installed; the output is in {log}")
        shutil.rmtree(package_folder(), ignore_errors=True)
        partial.rename(package_folder())
        step.done(f"{REQUIREMENTS[0]} compiled into {package_folder()}")


def arms(model: str, notes: list[str]) -> list[EngineArm]:
    """Return llama.cpp's arms for a packaged model: its GGUF file as it is, and the same weights in Q8_0.

    `notes` gets the reason if there are none.
    """
    if model not in PACKAGED:
        notes.append(f"llama.cpp is not measured: it needs a GGUF file; {', '.join(PACKAGED)} has one")
        return []
    if not installed():
        notes.append(MISSING)
        return []
    file = PACKAGED[model].locate()
    in_8_bits = in_q8_0(file, state_folder() / "llama-models")
    return [EngineArm("llama.cpp", weights_format(file), file), EngineArm("llama.cpp", "Q8_0", in_8_bits)]


def weights_format(file: Path) -> str:
    """Return the name of the type that most bytes of a GGUF file have: Q4_1."""
    import gguf

    sizes: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(file).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return sizes.most_common(1)[0][0]


def in_q8_0(source: Path, folder: Path) -> Path:
    """Return a GGUF file in `folder` with the same model and all its matrices in Q8_0; write it unless it is there."""
    target = folder / f"{source.stem.removesuffix('.' + weights_format(source))}.Q8_0.gguf"
    if not target.is_file() or target.stat().st_mtime < source.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        _write_q8_0(source, partial)
        partial.rename(target)
    return target


def _write_q8_0(source: Path, target: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer: Any = gguf.GGUFWriter(target, fields.pop("general.architecture").contents())
    fields.pop("general.file_type", None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, field in fields.items():
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if weight.ndim < 2:
            writer.add_tensor(tensor.name, weight)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
