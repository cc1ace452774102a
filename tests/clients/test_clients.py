"""Clients that others wrote, each with checks in its own way, against a running suite on a tiny random model.

`make test-clients` installs them. Without it only those that the development environment has are run.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from patience import HANG_S

from services.tools.bench.support.tiny import tiny_model
from services.tools.local.brokers import Brokers
from services.tools.local.stack import Stack

HERE = Path(__file__).parent
INSTALLED = HERE.parents[1] / ".wisp" / "clients"
PYTHON, NPM = INSTALLED / "bin" / "python", INSTALLED / "npm"
CONTEXT = 8192
OURS = ("check_anthropic.py", "check_openai.py")
"""Checks of clients that the development environment has."""
MISSING = "`make test-clients` installs this client"


def cases(pattern: str, installed: Path) -> list[Any]:
    """Return the files of checks, to be skipped where their clients are not installed."""
    files = [path.name for path in sorted(HERE.glob(pattern))]
    here = installed.exists()
    return [
        pytest.param(name, marks=pytest.mark.skipif(not here and name not in OURS, reason=MISSING)) for name in files
    ]


@pytest.fixture(scope="module")
async def stack(brokers: Brokers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tiny_model(tmp_path_factory.mktemp("clients") / "tiny", context=CONTEXT)
    unprofiled = {"verifier": {"WISP_PROFILE": "false"}}
    env = {"WISP_THREADS": "1", "WISP_ADMISSION": "false", "WISP_STALL_TIMEOUT_S": str(HANG_S)}
    async with Stack("clients", brokers=brokers, target=folder, env=env, env_of=unprofiled) as running:
        yield running


async def passes(stack: Stack, folder: Path, *command: str) -> None:
    """Run the checks of one client; fail with what they print unless they pass."""
    env = {
        **os.environ,
        "WISP_CLIENTS_URL": stack.url,
        "WISP_CLIENTS_MODEL": stack.target.name,
        "WISP_CLIENTS_CONTEXT": str(CONTEXT),
        "WISP_CLIENTS_TOKENIZER": str(stack.target / "tokenizer.json"),
        # Clients that would ask the network for prices, versions or telemetry.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "AI_SDK_LOG_WARNINGS": "false",
    }
    pipe, together = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, env=env, stdout=pipe, stderr=together)
    try:
        output, _ = await asyncio.wait_for(process.communicate(), HANG_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()


@pytest.mark.parametrize("checks", cases("python/check_*.py", PYTHON))
async def test_clients_for_python(stack: Stack, checks: str) -> None:
    python = sys.executable if checks in OURS else str(PYTHON)
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", ".", "--confcutdir", ".", "-c", "pytest.ini")
    await passes(stack, HERE / "python", python, "-m", "pytest", *options, checks)


@pytest.mark.parametrize("checks", cases("npm/*.test.mjs", NPM / "node_modules"))
async def test_clients_for_javascript(stack: Stack, tmp_path: Path, checks: str) -> None:
    # Node looks for packages beside the file that names them.
    (tmp_path / "node_modules").symlink_to(NPM / "node_modules")
    for name in (checks, "suite.mjs"):
        shutil.copy(HERE / "npm" / name, tmp_path / name)
    await passes(stack, tmp_path, "node", "--test", "--test-reporter", "spec", checks)
