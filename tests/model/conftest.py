"""Fixtures of the tests of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.tools.local.folder import state_folder
from shared.models.prepare import prepare


@pytest.fixture(scope="session")
def target_folder() -> Path:
    """The default target model, converted once per checkout."""
    return prepare("smollm2-135m-instruct", state_folder() / "models")
