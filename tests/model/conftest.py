"""Fixtures of the tests of models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from services.tools.local.folder import state_folder
from shared.models.prepare import prepare


@pytest.fixture(scope="session")
def target_folder() -> Path:
    """The default target model, converted once per checkout."""
    return prepare("smollm2-135m-instruct", state_folder() / "models")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, which is made once. Do not change it.

    Files that use it belong to the group `families` of `tests/groups.py`, so that one worker makes the models.
    """
    # Here, as it loads torch and transformers: the process that hands out tests to the workers needs neither.
    from tiny_families import FAMILIES

    @cache
    def made(name: str) -> Path:
        return FAMILIES[name](tmp_path_factory.mktemp(name))

    return made
