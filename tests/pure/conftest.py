"""Fixtures of the gateway's tests. They import it when they are used: other tests do not need its packages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gateway_app import App

    from shared.models.folder import ModelFolder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A tiny target for gateways, which have only its tokenizer and configuration."""
    from gateway_app import MODEL
    from gateway_peer import tiny_target

    return tiny_target(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture
async def app(folder: ModelFolder) -> AsyncIterator[App]:
    """A gateway whose sessions are watched."""
    from gateway_app import App

    app = App(folder)
    watching = asyncio.create_task(app.sessions.watch())
    yield app
    watching.cancel()
    await app.http.aclose()


@pytest.fixture
async def guarded(folder: ModelFolder, tmp_path: Path) -> AsyncIterator[tuple[App, str]]:
    """A gateway with API keys, and a valid key."""
    from gateway_app import App

    from services.gateway.keys import new_key, render

    text, key = new_key("tests", datetime.now(UTC))
    (tmp_path / "keys.json").write_text(render([key]))
    app = App(folder, api_keys_file=tmp_path / "keys.json")
    yield app, text
    await app.http.aclose()
