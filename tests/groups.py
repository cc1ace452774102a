"""Groups of tests: one worker of `make test` runs all tests of a group."""

from __future__ import annotations

from pathlib import PurePosixPath

FOLDERS = ("stack", "broker")
"""Folders whose tests share brokers and take minutes: each is one group, and they start first."""
FILES = {
    **dict.fromkeys(("test_compiled_pass.py", "test_families.py", "test_hidden_draft_passes.py"), "families"),
    **dict.fromkeys(("test_bench_gpu.py", "test_gpu_decoder.py", "test_gpu_engine.py", "test_gpu_kernels.py"), "gpu"),
    **dict.fromkeys(("test_errors.py", "test_layers.py", "test_names.py", "test_surfaces.py"), "source"),
}
"""Files that share what takes long to make: tiny models of all families, or the parsed source. Each other file is a
group of its own."""


def group_of(nodeid: str) -> str:
    """Return the group of a test."""
    file = PurePosixPath(nodeid.split("::")[0])
    folder = file.parent.name
    return folder if folder in FOLDERS else FILES.get(file.name, file.name)


def place_of(nodeid: str) -> int:
    """Return the place of a test's group in the order of all: the longest groups come first."""
    group = group_of(nodeid)
    return FOLDERS.index(group) if group in FOLDERS else len(FOLDERS)
