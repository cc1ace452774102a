"""The rendered manifests, shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from kustomized import VARIANTS, Rendered, copied, render


@pytest.fixture(scope="session")
def manifests_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("k8s") / "k8s")


@pytest.fixture(scope="session")
def all_rendered(manifests_folder: Path) -> dict[str, Rendered]:
    return {name: render(manifests_folder, name) for name in VARIANTS}


@pytest.fixture(params=VARIANTS)
def rendered(request: pytest.FixtureRequest, all_rendered: dict[str, Rendered]) -> Rendered:
    return all_rendered[request.param]
