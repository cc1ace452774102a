"""Tests are spread over the workers in groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from groups import FILES, group_of, place_of


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/stack/test_suite.py::test_a", "stack"),
        ("tests/stack/test_cluster.py::test_a", "tiny suites"),
        ("tests/broker/test_quota.py::test_a[b::c/d@e]", "broker"),
        ("tests/model/test_families.py::test_a", "families"),
        ("tests/pure/test_names.py::test_a", "source"),
        ("tests/pure/test_rope.py::TestA::test_b", "test_rope.py"),
    ],
)
def test_a_test_belongs_to_its_folder_its_shared_things_or_its_file(nodeid: str, group: str) -> None:
    assert group_of(nodeid) == group


def test_the_long_groups_come_first() -> None:
    files = [
        "tests/pure/test_a.py::t",
        "tests/broker/test_b.py::t",
        "tests/model/test_c.py::t",
        "tests/stack/test_chaos.py::t",
        "tests/stack/test_d.py::t",
    ]
    assert sorted(files, key=place_of) == [files[4], files[3], files[1], files[0], files[2]]


def test_grouped_files_exist() -> None:
    folder = Path(__file__).parents[1]
    assert {path.name for path in folder.rglob("test_*.py")} >= FILES.keys()


@pytest.mark.parametrize("number", range(8))
def test_one_worker_runs_a_whole_file(number: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Else each worker would make the fixtures of a file again."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        pytest.skip("there is one process only")
    seen = tmp_path_factory.getbasetemp().parent / "workers of a file"
    seen.mkdir(exist_ok=True)
    (seen / worker).touch()
    assert [path.name for path in seen.iterdir()] == [worker]
