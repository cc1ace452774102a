"""The start of a verifier, up to its model."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import tiny

from services.verifier.service import serve
from services.verifier.settings import VerifierSettings
from shared.errors import ModelError
from shared.models.folder import ModelFolder


def test_weights_are_read_beside_the_loop_that_answers_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    computed = ModelFolder.fingerprint

    def fingerprint(folder: ModelFolder, dtype: str) -> str:
        threads.append(threading.current_thread().name)
        return computed(folder, dtype)

    monkeypatch.setattr(ModelFolder, "fingerprint", fingerprint)
    settings = VerifierSettings(target=tiny.target(tmp_path).path, dtype="gguf")
    with pytest.raises(ModelError, match="has no GGUF file"):  # ends the start behind the fingerprint
        asyncio.run(serve(settings, "v", asyncio.Event()))
    assert threads == ["model_0"]
