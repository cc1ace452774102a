"""The layers: services without a model load no torch, and deciding code does no I/O."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from import_graph import ROOT, imports, is_package, loaded_by, modules, tree

PURE_MODULES = ("shared.messages", "shared.slo", "shared.errors")
"""Pure modules outside the pure packages."""
IMPURE = {
    "aio_pika", "aiormq", "asyncio", "concurrent", "datetime", "fastapi", "fcntl", "glob", "httpx", "io", "logging",
    "multiprocessing", "os", "pathlib", "prometheus_client", "psutil", "redis", "secrets", "select",
    "shutil", "signal", "socket", "ssl", "structlog", "subprocess", "sys", "tempfile", "threading", "time", "urllib",
    "uvicorn", "uvloop",
}  # fmt: skip
"""Modules that talk, wait, log, draw random numbers, or read files and clocks."""
IMPURE_CALLS = {"open", "print", "input", "breakpoint", "exec", "eval"}


def pure_packages() -> list[str]:
    """The outermost packages whose docstring contains `Pure:`."""
    saying = [name for name in modules() if is_package(name) and "Pure:" in (ast.get_docstring(tree(name)) or "")]
    return [name for name in saying if not any(name.startswith(f"{other}.") for other in saying)]


def pure_modules() -> list[str]:
    """Every module that has to be pure."""
    inside = [name for name in modules() for package in pure_packages() if f"{name}.".startswith(f"{package}.")]
    return [*inside, *PURE_MODULES]


@pytest.mark.parametrize("service", ["gateway", "scheduler", "estimator", "drafter"])
def test_a_service_without_a_model_starts_without_torch(service: str) -> None:
    code = f"import sys, services.{service}.service; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


def test_only_what_people_read_comes_from_a_wall_clock() -> None:
    """Clocks of hosts differ and jump. Times that matter are durations, or Redis's clock."""
    shown = {f"services/gateway/{name}.py" for name in ("app", "request")}
    shown |= {"shared/models/chat.py", "shared/models/folder.py"}
    readers = set()
    for path in [*(ROOT / "shared").rglob("*.py"), *(ROOT / "services").rglob("*.py")]:
        name = str(path.relative_to(ROOT))
        if name.startswith("services/tools/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            imported = (
                isinstance(node, ast.ImportFrom) and node.module == "time" and "time" in [n.name for n in node.names]
            )
            if imported or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "datetime.now")):
                readers.add(name)
    assert readers == shown


@pytest.mark.parametrize("service", ["gateway", "scheduler", "verifier", "drafter", "baseline", "drain_order"])
def test_a_service_that_decides_has_a_pure_package(service: str) -> None:
    assert f"services.{service}.core" in pure_packages()


@pytest.mark.parametrize("module", pure_modules())
def test_deciding_code_does_no_io(module: str) -> None:
    """Neither the module nor anything that it loads imports what talks, waits, logs or reads files and clocks."""
    impure = {
        f"{loaded} imports {found.module}"
        for loaded in loaded_by(module)
        for found in imports(loaded)
        if found.module.split(".")[0] in IMPURE
    }
    assert impure == set()


@pytest.mark.parametrize("module", pure_modules())
def test_deciding_code_calls_no_builtin_that_does_io(module: str) -> None:
    calls = {node.func for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}
    assert {call.id for call in calls if isinstance(call, ast.Name)} & IMPURE_CALLS == set()
