"""The layers: services without a model load no torch, and deciding code does no I/O."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache

import pytest
from import_graph import ROOT, imports, is_package, loaded_by, modules, nodes, tree

PURE_MODULES = (
    "shared.slo", "shared.errors", "shared.prediction", "shared.lookup", "shared.log_odds", "shared.sampling.rules",
)  # fmt: skip
"""Pure modules outside the pure packages."""
IMPURE = {
    "aio_pika", "aiormq", "asyncio", "concurrent", "datetime", "fastapi", "fcntl", "glob", "httpx", "io", "logging",
    "multiprocessing", "os", "pathlib", "prometheus_client", "psutil", "redis", "secrets", "select",
    "shutil", "signal", "socket", "ssl", "structlog", "subprocess", "sys", "tempfile", "threading", "time", "urllib",
    "uvicorn", "uvloop",
}  # fmt: skip
"""Modules that talk, wait, log, draw random numbers, or read files and clocks."""
IMPURE_CALLS = {"open", "print", "input", "breakpoint", "exec", "eval"}


@cache
def pure_packages() -> list[str]:
    """The outermost packages whose docstring contains `Pure:`."""
    saying = [name for name in modules() if is_package(name) and "Pure:" in (ast.get_docstring(tree(name)) or "")]
    return [name for name in saying if not any(name.startswith(f"{other}.") for other in saying)]


@cache
def pure_modules() -> list[str]:
    """Every module that has to be pure."""
    inside = [name for name in modules() for package in pure_packages() if f"{name}.".startswith(f"{package}.")]
    return [*inside, *PURE_MODULES]


def test_a_service_without_a_model_starts_without_torch() -> None:
    code = """
import importlib, sys
for service in ("gateway", "scheduler", "estimator", "drafter"):
    importlib.import_module(f"services.{service}.service")
    if loaded := {"torch", "transformers"} & sys.modules.keys():
        sys.exit(f"{service} loads {loaded}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("service", ["scheduler", "drafter", "estimator", "drain_order"])
def test_a_service_starts_with_the_packages_that_all_services_need(service: str) -> None:
    """Packages of the extras need not be installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {re.split(r"[^\w-]", line)[0] for lines in project["optional-dependencies"].values() for line in lines}
    needed = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    missing = {name.replace("-", "_").lower() for name in extras - needed}
    assert {"llguidance", "tokenizers", "jinja2", "torch"} <= missing
    code = f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"{service} loads {{name}}", name=name)
sys.meta_path.insert(0, Missing())
importlib.import_module("services.{service}.service")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_only_times_for_people_come_from_a_wall_clock() -> None:
    """Clocks of hosts differ and jump. Times that matter are durations, or Redis's clock; ages of files are rough."""
    readers = {name for name in modules() if not name.startswith("services.tools.") and reads_wall_clock(name)}
    assert readers == {
        "services.gateway.app",
        "services.gateway.request",
        "shared.kernels.native",
        "shared.models.chat",
        "shared.models.folder_files",
    }


def reads_wall_clock(module: str) -> bool:
    """Return whether a module imports `time.time`, or uses it or `datetime.now`."""
    for node in nodes(module):
        match node:
            case ast.ImportFrom(module="time", names=names) if "time" in [alias.name for alias in names]:
                return True
            case ast.Attribute(value=ast.Name(id="time"), attr="time"):
                return True
            case ast.Attribute(value=ast.Name(id="datetime"), attr="now"):
                return True
    return False


def test_no_process_computes_with_code_that_it_compiled_itself() -> None:
    """Only the process that writes the object file loads numba.

    numba's just-in-time code once had other bits in the process that compiled it than in one that loaded it from
    numba's cache, so that two verifiers of a new checkout gave different texts.
    """
    source = "shared.kernels.source"
    inside = {name for name in modules() if f"{name}.".startswith(f"{source}.")}
    loaders = {name for name in modules() if any(found.module.split(".")[0] == "numba" for found in imports(name))}
    assert loaders
    assert loaders <= inside
    importers = {name for name in modules() if any(found.target in inside for found in imports(name))}
    assert importers - inside == {"shared.kernels.native"}, "it runs `python -m` of it"


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
    calls = {node.func for node in nodes(module) if isinstance(node, ast.Call)}
    assert {call.id for call in calls if isinstance(call, ast.Name)} & IMPURE_CALLS == set()
