"""Installs brokers with apt and keeps the packages from starting system services."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from services.tools.local.broker_sources import APT_PACKAGES
from services.tools.local.process import Process
from services.tools.local.progress import ProgressStep
from shared.errors import BrokersError

POLICY = Path("/usr/sbin/policy-rc.d")
UNITS = ("rabbitmq-server.service", "redis-server.service", "epmd.service", "epmd.socket")
LOCK_TIMEOUT_S = 300
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
}


async def install(names: list[str], log: Path, step: ProgressStep) -> None:
    """Install the packages of brokers. Raises BrokersError with the end of apt's output."""
    options = ["-q", "-o", f"DPkg::Lock::Timeout={LOCK_TIMEOUT_S}", "-o", "APT::Status-Fd=1"]
    packages = [APT_PACKAGES[name] for name in names]
    present = await _units()
    with _no_service_starts():
        await _run(["apt-get", "update", *options], log, step)
        await _run(["apt-get", "install", "-y", "--no-install-recommends", *options, *packages], log, step)
    if added := sorted(await _units() - present):
        await _systemctl("disable", "--now", *added)
    step.done(f"installed {' and '.join(names)} with apt")


def progress_line(line: str) -> str | None:
    """Format a line of apt's status (`pmstatus:PACKAGE:PERCENT:TEXT`) for people; None for other lines."""
    parts = line.strip().split(":", 3)
    if len(parts) < 4 or parts[0] not in {"pmstatus", "dlstatus"}:
        return None
    try:
        return f"{float(parts[2]):.0f} % {parts[3]}"
    except ValueError:
        return None


async def _run(command: list[str], log: Path, step: ProgressStep) -> None:
    process = await Process.start(command[0], command, log=log, environment=ENVIRONMENT)
    try:
        while process.alive:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await process.wait()
            shown = next(
                (text for line in reversed(process.tail().splitlines()) if (text := progress_line(line))), None
            )
            if shown:
                step.detail(shown)
    except BaseException:
        # An interrupted apt needs time to leave the package database in order.
        await asyncio.shield(process.stop(grace_s=60.0))
        raise
    if process.returncode:
        raise BrokersError(
            f"`{' '.join(command[:2])}` failed with status {process.returncode}; the end of its output ({log}):\n"
            f"{process.tail()}\nRun `{' '.join(command[:2])} ...` by hand to see more, or set WISP_AMQP_URL and "
            "WISP_REDIS_URL to servers that you run."
        )


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    """Keep the packages from starting system services, unless the machine has a policy of its own.

    The policy ends with this process: a file that is left behind allows everything.
    """
    if POLICY.exists():
        yield
        return
    POLICY.write_text(
        "#!/bin/sh\n# Temporary, by wisp: may be deleted.\n"
        f"kill -0 {os.getpid()} 2>/dev/null || exit 0\n"
        'case "$1" in rabbitmq-server*|redis*|epmd*) exit 101;; esac\nexit 0\n'
    )
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)


def _systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


async def _units() -> set[str]:
    """Return the packages' units that systemd has; none without systemd."""
    if not _systemd():
        return set()
    child = await asyncio.create_subprocess_exec(
        "systemctl", "list-unit-files", "--no-legend", "--plain", *UNITS, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await child.communicate()
    return {line.split()[0] for line in output.decode().splitlines() if line.strip()}


async def _systemctl(*arguments: str) -> None:
    child = await asyncio.create_subprocess_exec(
        "systemctl", *arguments, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    await child.wait()
