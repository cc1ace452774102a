"""Machine code of the kernels: compiled once per level of CPU, kept in a file, and loaded without numba.

`python -m shared.kernels.native` compiles for this CPU, with `all` for every level of this kind of machine. `load`
compiles too where nothing was compiled yet. A level is a set of instructions that many CPUs share, so that an image
made on one machine serves on others. The bits of results are the same on every level.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

_LOCK: Final = ".lock"
SYMBOL: Final = "wisp_kernels"
LEVELS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "x86_64": {
        "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
        "x86-64-v3": ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"),
        "x86-64-v2": (),
    },
    "aarch64": {"generic": ()},
    "arm64": {"generic": ()},
}
"""Levels by machine, best first, with the features that a CPU needs for each. Their names are LLVM's."""
_WHOLE_REGISTERS: Final = "-prefer-256-bit"
"""Without it, LLVM uses only half of each 512-bit register."""
_UNUSED_S: Final = 14 * 24 * 3600.0
"""An object file that no process has loaded for this long is removed when another is written beside it. Others stay:
several versions may share an environment, and a process may be about to load one."""
_TOUCHED_S: Final = 24 * 3600.0
"""Loading marks an object file as used, at most this often."""
_USED: Final = ("formats", "layout", "native")
"""Modules beside the source that decide what it compiles to."""


def levels() -> dict[str, tuple[str, ...]]:
    """Return the levels of this kind of machine; one without a name for kinds not listed."""
    return LEVELS.get(platform.machine(), {"generic": ()})


@cache
def level() -> str:
    """Return the best level that this CPU has."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return next(name for name, needed in levels().items() if all(features.get(feature) for feature in needed))


def vector_lanes() -> int:
    """Return the width of the registers in float32 values, for the CPU that numba compiles for."""
    return 16 if os.environ.get("NUMBA_CPU_NAME") == "x86-64-v4" else 8


@cache
def load() -> Callable[[int], None]:
    """Return the kernels: a function of the address of a job (`passes`). Releases the GIL while it runs.

    The first call on a machine compiles them, which takes half a minute, unless `make setup` has done so.
    """
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly("")
    module.triple = binding.get_process_triple()
    engine = binding.create_mcjit_compiler(module, binding.Target.from_default_triple().create_target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(_object(level())))
    engine.finalize_object()
    _alive.append(engine)
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(engine.get_function_address(SYMBOL))


_alive: list[object] = []
"""Engines that hold the machine code."""


def _object(name: str) -> bytes:
    """Return the object file of a level, compiled if it is not there yet."""
    file = _file(name)
    for folder in folders():
        with suppress(OSError):  # not there, or another user's folder
            content = (folder / file).read_bytes()
            _mark_used(folder / file)
            return content
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(folder / _LOCK):
                if not (folder / file).is_file():  # another process may have been quicker
                    content = _compiled(name)
                    _write(folder / file, content)
                    _remove_unused(folder)
                return (folder / file).read_bytes()
        except OSError:  # a read-only file system, or another user's folder
            continue
    return _compiled(name)


def _file(name: str) -> str:
    return f"{name}-{_digest()}.o"


def _mark_used(path: Path) -> None:
    """Set the file's time of access to now, if it is a day old; systems often do not keep it."""
    with suppress(OSError):  # a read-only file system, or another user's file
        status = path.stat()
        if time.time() - status.st_atime > _TOUCHED_S:
            os.utime(path, (time.time(), status.st_mtime))


def _remove_unused(folder: Path) -> None:
    """Remove object files of older sources, and parts of files that killed processes left."""
    for path in folder.iterdir():
        with suppress(OSError):  # another process was quicker
            used = max(path.stat().st_atime, path.stat().st_mtime)
            if path.name != _LOCK and path.is_file() and time.time() - used > _UNUSED_S:
                path.unlink()


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically: other processes see all of it or none."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
        try:
            partial.write(content)
            partial.flush()
            os.chmod(partial.name, 0o644)
            os.replace(partial.name, path)
        except BaseException:
            os.unlink(partial.name)
            raise


def folders() -> list[Path]:
    """Return where object files are looked for: beside the environment, then in the user's cache."""
    # Without a home, as for a container's user who has no name, expanduser returns its argument.
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [
        Path(sys.prefix) / "share" / "wisp-kernels",
        *([home / "wisp" / "kernels"] if home.is_absolute() else []),
    ]


@cache
def _digest() -> str:
    """Return the identity of the kernels' source and of their compiler."""
    digest = hashlib.sha256(f"{version('numba')} {version('llvmlite')}".encode())
    here = Path(__file__)
    for path in [*sorted(here.with_name("source").glob("*.py")), *(here.with_name(f"{name}.py") for name in _USED)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compiled(name: str) -> bytes:
    """Compile the kernels for a level in a process of its own, as numba compiles for one CPU per process."""
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": _WHOLE_REGISTERS if name == "x86-64-v4" else "",
    }
    # Without what a debugger of numba may have set: it would change the code.
    environment = {key: value for key, value in environment.items() if key not in ("NUMBA_OPT", "NUMBA_DEBUG")}
    command = [sys.executable, "-m", "shared.kernels.source"]
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise RuntimeError(
            f"the kernels could not be compiled for {name} (exit status {done.returncode}, the reason is above): "
            "install numba and llvmlite as pinned in constraints.txt"
        )
    return done.stdout


def main() -> None:
    """Compile the levels named on the command line, or this machine's, and print their names."""
    names = list(levels()) if sys.argv[1:] == ["all"] else sys.argv[1:] or [level()]
    if unknown := [name for name in names if name not in levels()]:
        sys.exit(f"{unknown[0]!r} is no level of {platform.machine()}: choose from all, {', '.join(levels())}")
    for name in names:
        print(f"compiling for {name}", flush=True)
        _object(name)
        for folder in folders():  # the set-up compares its time with that of the source
            with suppress(OSError):
                os.utime(folder / _file(name))
    print(f"for {', '.join(names)}")


if __name__ == "__main__":
    main()
