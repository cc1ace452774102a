"""The facts about this machine that decide where brokers come from."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RABBITMQ_SCRIPTS = (
    "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server",
    "/opt/rabbitmq_server-*/sbin/rabbitmq-server",
    "/opt/rabbitmq/sbin/rabbitmq-server",
    "/opt/homebrew/opt/rabbitmq/sbin/rabbitmq-server",
    "/usr/local/opt/rabbitmq/sbin/rabbitmq-server",
    "/home/linuxbrew/.linuxbrew/opt/rabbitmq/sbin/rabbitmq-server",
)
EPMD_BINARIES = ("/usr/lib/erlang/erts-*/bin/epmd", "/usr/lib64/erlang/erts-*/bin/epmd", "/opt/erlang/erts-*/bin/epmd")
REDIS_BINARIES = ("/usr/bin/redis-server", "/opt/homebrew/bin/redis-server", "/usr/local/bin/redis-server")
CONTAINER_PROBE_S = 5.0


@dataclass(frozen=True)
class Machine:
    """Programs, distribution and rights found on this machine; None or False for a missing one."""

    rabbitmq: Path | None
    epmd: Path | None
    redis: Path | None
    distribution: str
    """`ID` and `ID_LIKE` of os-release, separated by spaces; `macos` on macOS."""
    root: bool
    apt: bool
    container: str | None
    """`docker` or `podman`, if its engine answers."""

    @property
    def debian(self) -> bool:
        """True if this is Debian, Ubuntu or a derivative."""
        return not {"debian", "ubuntu"}.isdisjoint(self.distribution.split())

    @property
    def rabbitmq_installed(self) -> bool:
        """True if RabbitMQ can be started; it needs Erlang's port mapper as well."""
        return self.rabbitmq is not None and self.epmd is not None


def inspect_machine(search_path: str | None = None, root: Path = Path("/")) -> Machine:
    """Inspect this machine. Tests replace PATH by `search_path` and the file system by `root`."""
    return Machine(
        rabbitmq=_first(RABBITMQ_SCRIPTS, root) or _rabbitmq_on(search_path),
        epmd=_which(("epmd",), search_path) or _first(EPMD_BINARIES, root),
        redis=_which(("redis-server", "valkey-server"), search_path) or _first(REDIS_BINARIES, root),
        distribution=_distribution(root),
        root=os.geteuid() == 0,
        apt=_which(("apt-get",), search_path) is not None,
        container=None,
    )


async def container_engine() -> str | None:
    """Return `docker` or `podman`, the first whose engine answers within `CONTAINER_PROBE_S`; else None."""
    for name in ("docker", "podman"):
        if shutil.which(name) is None:
            continue
        child = await asyncio.create_subprocess_exec(
            name,
            "version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(CONTAINER_PROBE_S):
                if await child.wait() == 0:
                    return name
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    return None


def version_in(text: str) -> tuple[int, ...]:
    """Return the first dotted version number in `text` for comparisons; empty if there is none."""
    found = re.search(r"\d+(?:\.\d+)+", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _first(patterns: Sequence[str], root: Path) -> Path | None:
    """Return the newest executable of the first pattern with a match."""
    for pattern in patterns:
        found = [path for path in root.glob(pattern.lstrip("/")) if os.access(path, os.X_OK)]
        if found:
            return max(found, key=lambda path: version_in(str(path)))
    return None


def _which(names: Sequence[str], search_path: str | None) -> Path | None:
    for name in names:
        if found := shutil.which(name, path=search_path):
            return Path(found)
    return None


def _rabbitmq_on(search_path: str | None) -> Path | None:
    """Return `rabbitmq-server` on PATH, unless it is a package's wrapper that switches to the system user."""
    found = _which(("rabbitmq-server",), search_path)
    if found is None:
        return None
    try:
        text = found.read_text(errors="replace")
    except OSError:
        return None
    return None if re.search(r"\b(su|runuser|sudo)\b.*\brabbitmq\b", text) else found


def _distribution(root: Path) -> str:
    if platform.system() == "Darwin":
        return "macos"
    try:
        fields = dict(line.split("=", 1) for line in (root / "etc/os-release").read_text().splitlines() if "=" in line)
    except OSError:
        return ""
    return " ".join(fields.get(key, "").strip("\"'") for key in ("ID", "ID_LIKE")).strip()
