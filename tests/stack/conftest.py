"""The suite with the real model, shared by all tests here, and the completions that it must give."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from asking import QUESTIONS, SAMPLINGS, Case, Client, Traffic, decode, watching
from patience import HANG_S

from services.tools.local.brokers import Brokers
from services.tools.local.stack import Stack
from shared.engine import Engine
from shared.models.folder import ModelFolder
from shared.models.prepare import prepare
from shared.models.text import Tokenizer


@pytest.fixture(scope="session")
def target_folder() -> Path:
    """The prepared default target."""
    return prepare("smollm2-135m-instruct", Path(".wisp/models"))


@pytest.fixture(scope="session")
def cases(target_folder: Path) -> list[Case]:
    """Every question with every sampling, decoded by the bare engine token by token."""
    tokenizer = Tokenizer(ModelFolder(target_folder))
    eos = set(ModelFolder(target_folder).eos_ids)
    engine = Engine(target_folder, budget_tokens=4096)
    found = []
    for question in QUESTIONS:
        prompt = tokenizer.render_chat([{"role": "user", "content": question}])
        found += [Case(prompt, sampling, decode(engine, prompt, sampling, eos)) for sampling in SAMPLINGS]
    return found


@pytest.fixture(scope="session")
async def stack(brokers: Brokers, target_folder: Path) -> AsyncIterator[Stack]:
    """Two drafters and two verifiers behind one gateway without admission control.

    Drafts are verified untrimmed, and sessions whose drafts do not pay go on with rounds: test_exactness_runs.py has
    runs.
    """
    env = {
        "WISP_CACHE_TOKENS": "4096",
        "WISP_ADMISSION": "false",
        # Eighteen sessions at once take minutes on a slow CPU.
        "WISP_STALL_TIMEOUT_S": str(HANG_S),
        "WISP_MAX_BACKLOG_MS": str(HANG_S * 1000),
    }
    whole = {"scheduler": {"WISP_WITHOUT": '["trimming", "runs"]', "WISP_MAX_BATCH_MS": "5000"}}
    async with Stack(
        "test-stack", brokers=brokers, target=target_folder, drafters=2, verifiers=2, env=env, env_of=whole
    ) as running:
        yield running


@pytest.fixture(scope="session")
async def traffic(stack: Stack) -> AsyncIterator[Traffic]:
    """The recorded traffic between the services."""
    async with watching(stack) as seen:
        yield seen


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    """A client of the gateway."""
    async with httpx.AsyncClient(timeout=HANG_S) as http:
        yield Client(http, stack)
