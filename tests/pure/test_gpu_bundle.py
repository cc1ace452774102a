"""`make gpu-bundle`: pieces that a Python with torch, and nothing else, puts together."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from import_graph import ROOT

from services.tools.bench.gpu import bundle, unpack
from shared.errors import SettingsError

HERE = "{}.{}".format(*sys.version_info[:2])


def wheel(folder: Path, name: str, version: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"version = '{version}'\n")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with three packages, in pieces of 1,000 bytes."""
    monkeypatch.setattr(bundle, "PIECE_BYTES", 1000)
    wheel(tmp_path / "wheels" / "any", "wisp_lacking", "1.0")
    wheel(tmp_path / "wheels" / HERE, "numpy", "99.0")
    wheel(tmp_path / "model" / "any", "typer", "0.0.1")
    folder = tmp_path / "bundle"
    names = ["pyproject.toml", "services/tools/bench/gpu/unpack.py", "services/__init__.py"]
    bundle.write(folder, [HERE], names, tmp_path / "wheels", tmp_path / "model")
    return folder


def test_a_bundle_has_the_sources_and_what_this_python_lacks(made: Path, tmp_path: Path) -> None:
    assert all(piece.stat().st_size <= 1000 for piece in made.glob("*.tar*"))
    to = tmp_path / "there it is"
    done = subprocess.run(
        [sys.executable, "unpack.py", "--to", str(to)], cwd=made, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 packages that this Python lacked" in done.stdout
    assert (to / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()
    assert sorted(path.name for path in (to / unpack.SITE).iterdir()) == ["numpy", "wisp_lacking"]
    command = (to / "wisp").read_text()
    assert f"cd '{to}'" in command
    assert (to / "wisp").stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda piece: piece.unlink(), "lacks code.tar.gz.1"),
        (lambda piece: piece.write_bytes(piece.read_bytes()[:-1] + b"?"), "code.tar.gz.1 is damaged"),
    ],
)
def test_missing_and_damaged_pieces_are_named(damage: object, message: str, made: Path, tmp_path: Path) -> None:
    damage(made / "code.tar.gz.1")  # type: ignore[operator]
    with pytest.raises(unpack.BundleProblem, match=message):
        unpack.unpack(made, tmp_path / "to")


def test_a_bundle_without_its_list_or_room_is_a_line_of_error(made: Path, tmp_path: Path) -> None:
    (occupied := tmp_path / "occupied").write_text("")
    with pytest.raises(unpack.BundleProblem, match="Choose another folder: --to"):
        unpack.unpack(made, occupied)
    (made / unpack.CONTENTS).write_text("{")
    with pytest.raises(unpack.BundleProblem, match=r"bundle\.json is missing or damaged"):
        unpack.unpack(made, tmp_path / "to")


def test_another_python_is_told_how_to_get_a_bundle(made: Path, tmp_path: Path) -> None:
    contents = json.loads((made / unpack.CONTENTS).read_text())
    (made / unpack.CONTENTS).write_text(json.dumps(contents | {"pythons": ["3.9"]}))
    with pytest.raises(unpack.BundleProblem, match=rf"for Python 3\.9, and this is {HERE}.*--python {HERE}"):
        unpack.unpack(made, tmp_path / "to")


def test_a_bundle_replaces_nothing_but_a_bundle(made: Path, tmp_path: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    for folder in (made, empty, tmp_path / "new"):
        assert bundle.replaceable(folder) == folder
    for other in (tmp_path, made / unpack.CONTENTS):
        with pytest.raises(SettingsError, match="there are files of no bundle"):
            bundle.replaceable(other)


def test_a_package_is_there_in_its_version_or_a_later_one() -> None:
    found = importlib.metadata.version("numpy")
    assert unpack.is_there("numpy", found)
    assert unpack.is_there("numpy", "1.0rc1")
    assert not unpack.is_there("numpy", "99.0")
    assert not unpack.is_there("wisp_lacking", "1.0")
    assert unpack.numbers("2.13.0+cu130") == [2, 13, 0]


def test_a_bundle_takes_the_files_that_git_tracks() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    assert {"pyproject.toml", "services/tools/bench/gpu/unpack.py"} <= set(bundle.sources(ROOT))
