"""Groups of tests: one worker of `make test` runs all tests of a group."""

from __future__ import annotations

from pathlib import PurePosixPath

LONG = ("stack", "tiny suites", "broker")
"""Groups that share brokers and take minutes: they start first, in this order. Two of them are folders."""
FILES = {
    **dict.fromkeys(
        (
            "test_chaos.py",
            "test_clients.py",
            "test_cluster.py",
            "test_kv_memory.py",
            "test_no_drafter.py",
            "test_ordinary_use.py",
            "test_replay.py",
            "test_rolling_update.py",
            "test_structured_output.py",
            "test_takeover.py",
            "test_twin_suite.py",
        ),
        "tiny suites",
    ),
    **dict.fromkeys(("test_compiled_pass.py", "test_families.py", "test_hidden_draft_passes.py"), "families"),
    **dict.fromkeys(
        (
            "test_bench_gpu.py",
            "test_gpu_decoder.py",
            "test_gpu_engine.py",
            "test_gpu_kernels.py",
            "test_gpu_several.py",
        ),
        "gpu",
    ),
    **dict.fromkeys(("test_alerts.py", "test_manifests.py"), "manifests"),
    **dict.fromkeys(("test_errors.py", "test_layers.py", "test_names.py", "test_surfaces.py"), "source"),
}
"""Files that share what takes long to make, such as tiny models of all families, rendered manifests or the parsed
source, and suites with tiny models, which need nothing of the suite with the default model. Each other file is a group
of its own."""


def group_of(nodeid: str) -> str:
    """Return the group of a test."""
    file = PurePosixPath(nodeid.split("::")[0])
    folder = file.parent.name
    return FILES.get(file.name) or (folder if folder in LONG else file.name)


def place_of(nodeid: str) -> int:
    """Return the place of a test's group in the order of all: the longest groups come first."""
    group = group_of(nodeid)
    return LONG.index(group) if group in LONG else len(LONG)
