"""The start of services with an HTTP API, up to their model."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from services.baseline import service as baseline
from services.baseline.settings import BaselineSettings
from services.gateway import service as gateway
from services.gateway.settings import GatewaySettings
from shared.errors import ModelError
from shared.models.folder import ModelFolder


@pytest.mark.parametrize(("service", "kind"), [(gateway, GatewaySettings), (baseline, BaselineSettings)])
async def test_weights_are_read_beside_the_loop_that_answers_probes(
    service: Any, kind: Any, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def fingerprint(folder: ModelFolder, dtype: str) -> str:
        threads.append(threading.current_thread())
        raise ModelError("the weights cannot be read")

    monkeypatch.setattr(ModelFolder, "fingerprint", fingerprint)
    with pytest.raises(ModelError, match="cannot be read"):
        await service.serve(kind(target=folder.path), "one", asyncio.Event())
    (thread,) = threads
    assert thread is not threading.current_thread()
