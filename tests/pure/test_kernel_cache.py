"""The kernels' machine code is compiled once, wherever a process may keep it, and anew for another source."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.kernels import native

LEVEL = "x86-64-v3"
CODE = b"machine code"

COMPILING = """
import sys, time
from pathlib import Path
from shared.kernels import native

def compiled(name):
    with open(sys.argv[1] + "/compiled", "a") as log:
        log.write(name + "\\n")
    time.sleep(1)  # the other process comes meanwhile
    return b"machine code"

native._compiled = compiled
sys.prefix = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
assert native._object(sys.argv[2]) == b"machine code"
"""


class Compilations:
    """Stands for the compiler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.levels: list[str] = []
        self.environment = tmp_path / "environment"
        self.home = tmp_path / "home"
        self.environment.mkdir()
        self.home.mkdir()
        monkeypatch.setattr(native, "_compiled", self._compile)
        monkeypatch.setattr(sys, "prefix", str(self.environment))
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.home))

    def _compile(self, level: str) -> bytes:
        self.levels.append(level)
        return CODE

    def files(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compilations:
    return Compilations(monkeypatch, tmp_path)


def test_code_is_compiled_once_per_level_beside_the_environment(compilations: Compilations) -> None:
    for level in (LEVEL, LEVEL, "x86-64-v2", LEVEL):
        assert native._object(level) == CODE
    assert compilations.levels == [LEVEL, "x86-64-v2"]
    digest = native._digest()
    assert compilations.files(compilations.environment) == [f"x86-64-v2-{digest}.o", f"{LEVEL}-{digest}.o"]
    assert compilations.files(compilations.home) == []
    (file,) = compilations.environment.rglob(f"{LEVEL}-*.o")
    assert file.stat().st_mode & 0o777 == 0o644, "an image's other users read it"


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(native.__file__).parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILING, str(tmp_path), LEVEL],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("\n")
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert (tmp_path / "compiled").read_text() == f"{LEVEL}\n"


def in_the_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a file where the folder should be."""
    folder.parent.mkdir(parents=True)
    folder.write_text("")


def refusing(error: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the folder can be opened, which file modes alone do not do to the root user."""
    folder.mkdir(parents=True)
    opened = Path.open

    def refuse(path: Path, *args: object, **options: object) -> object:
        if folder in path.parents:
            raise OSError(error, os.strerror(error), str(path))
        return opened(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(errno.EROFS, folder, monkeypatch)


def another_users(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(errno.EACCES, folder, monkeypatch)


@pytest.mark.parametrize("unusable", [in_the_way, read_only, another_users])
def test_the_users_cache_takes_what_the_environment_cannot(
    compilations: Compilations,
    monkeypatch: pytest.MonkeyPatch,
    unusable: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    unusable(native.folders()[0], monkeypatch)
    assert native._object(LEVEL) == native._object(LEVEL) == CODE
    assert compilations.levels == [LEVEL]
    assert compilations.files(compilations.home) == [f"{LEVEL}-{native._digest()}.o"]


def test_code_that_can_be_kept_nowhere_is_compiled_each_time(
    compilations: Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in native.folders():
        in_the_way(folder, monkeypatch)
    assert native._object(LEVEL) == native._object(LEVEL) == CODE
    assert compilations.levels == [LEVEL, LEVEL]


def test_a_user_without_a_home_has_no_cache(compilations: Compilations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert native.folders() == [compilations.environment / "share" / "wisp-kernels"]


def test_a_disk_that_is_full_keeps_no_part_of_a_file(
    compilations: Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert native._object(LEVEL) == CODE
    assert compilations.files(compilations.environment) == compilations.files(compilations.home) == []


def test_code_of_another_source_or_compiler_is_compiled_anew(
    compilations: Compilations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digest = native._digest.__wrapped__
    package = shutil.copytree(Path(native.__file__).parent, tmp_path / "kernels")
    expected = digest()
    monkeypatch.setattr(native, "__file__", str(package / "native.py"))
    assert digest() == expected, "it does not depend on where the source lies"
    found = {expected}
    for file in ("source/products.py", "layout.py", "formats.py"):
        (package / file).write_bytes((package / file).read_bytes() + b"\n")
        found.add(digest())
    monkeypatch.setattr(native, "version", lambda name: "0")
    found.add(digest())
    assert len(found) == 5
    for each in found:
        monkeypatch.setattr(native, "_digest", lambda each=each: each)
        native._object(LEVEL)
    assert compilations.levels == [LEVEL] * 5


def test_code_that_nothing_has_used_for_weeks_makes_room(compilations: Compilations) -> None:
    native._object(LEVEL)
    (kept,) = compilations.environment.rglob("*.o")
    now = time.time()
    for name, age_days, change_days in (
        ("x86-64-v2-old.o", 20, 20),
        ("tmpabcd", 20, 20),  # of a process that was killed while it wrote
        ("x86-64-v2-other.o", 3, 3),
        ("x86-64-v2-used.o", 3, 60),
        (".lock", 60, 60),
    ):
        path = kept.with_name(name)
        path.touch()
        os.utime(path, (now - age_days * 86400, now - change_days * 86400))
    native._object("x86-64-v4")
    names = {path.name for path in kept.parent.iterdir()}
    assert names == {kept.name, f"x86-64-v4-{native._digest()}.o", "x86-64-v2-other.o", "x86-64-v2-used.o", ".lock"}


def test_loading_marks_code_as_used_and_not_as_compiled(compilations: Compilations) -> None:
    native._object(LEVEL)
    (file,) = compilations.environment.rglob("*.o")
    before = time.time() - 3 * 86400
    os.utime(file, (before, before))
    assert native._object(LEVEL) == CODE
    status = file.stat()
    assert (status.st_mtime, status.st_atime > before + 86400) == (before, True)


def test_the_command_line_compiles_the_levels_that_it_names(
    compilations: Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "argv", ["native", "x86-64-v2", "x86-64-v4"])
    native.main()
    assert compilations.levels == ["x86-64-v2", "x86-64-v4"]
    monkeypatch.setattr(sys, "argv", ["native", "x86-64-v9"])
    with pytest.raises(SystemExit, match="'x86-64-v9' is no level of x86_64: choose from all, x86-64-v4, "):
        native.main()
    monkeypatch.setattr(native.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(sys, "argv", ["native", "all"])
    native.main()
    assert compilations.levels == ["x86-64-v2", "x86-64-v4", "generic"]


def test_a_compilation_that_fails_names_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match=rf"could not be compiled for {LEVEL} \(exit status 1, .*install numba"):
        native._compiled(LEVEL)
