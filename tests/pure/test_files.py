"""Files that are written by replacement: links, owners, modes, and what an error leaves."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.gateway.keys import KeyFile
from services.tools.cli.broker_command import filled
from services.tools.cli.main import app
from shared.errors import SettingsError
from shared.runtime import files
from shared.runtime.files import replacing


def wisp(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """A link to a link to a file in another folder."""
    (tmp_path / "real").mkdir()
    (tmp_path / "between.json").symlink_to(tmp_path / "real" / "file.json")
    link = tmp_path / "link.json"
    link.symlink_to("between.json")
    return link


def test_a_key_is_made_and_revoked_in_the_file_behind_links(link: Path) -> None:
    key = wisp("keys", "new", "ann", "--file", link).strip()
    real = link.resolve()
    assert KeyFile(real).ring.match(key) is not None
    wisp("keys", "revoke", "ann", "--file", link)
    assert link.is_symlink()
    assert KeyFile(real).ring.match(key) is None


def test_passwords_are_added_to_the_file_behind_links(link: Path) -> None:
    link.resolve().write_text('{"one": "kept"}')
    filled(link, ["one", "two"])
    assert link.is_symlink()
    known = json.loads(link.resolve().read_text())
    assert known["one"] == "kept"
    assert known.keys() == {"one", "two"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(file) as draft:
        draft.write_text("new \ud800", "utf-8")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_keeps_its_mode_and_a_new_one_gets_the_given_mode(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with replacing(file, 0o600) as draft:
        assert draft.stat().st_mode & 0o077 == 0
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    with replacing(file, 0o600) as draft:
        assert draft.stat().st_mode & 0o077 == 0, "private until it is complete"
    assert file.stat().st_mode & 0o777 == 0o640


def test_an_owner_that_cannot_be_kept_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "chown", refused)
    with pytest.raises(SettingsError, match="belongs to another user"), replacing(file) as draft:
        draft.write_text("new")
    assert file.read_text() == "old"


def test_a_loop_of_links_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=r"loop|levels"), replacing(tmp_path / "a"):
        pass


def test_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "file[1]"
    abandoned, others = tmp_path / ".file[1].0badcafe.new", tmp_path / ".file[1].c0ffee00.new"
    for draft in (abandoned, others):
        draft.touch()
    long_ago = time.time() - files.ABANDONED_S - 1
    os.utime(abandoned, (long_ago, long_ago))
    with replacing(file):
        pass
    assert set(tmp_path.iterdir()) == {file, others}
