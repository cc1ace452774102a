"""Brokers in containers, with a fake engine that runs the container's command on this machine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest
from leftovers import descendants, leftovers

from services.tools.local import containers
from services.tools.local.broker_check import check_redis
from services.tools.local.machine import container_engine
from services.tools.local.progress import ProgressStep
from shared.errors import BrokersError

ENGINE = """#!/bin/sh
# Stands in for docker: `version`, `image inspect`, and a `run` that keeps the arguments' meaning.
case "$1" in version|image) exit 0;; esac
publish= ; previous=
while [ "$1" != "-c" ]; do
    [ "$previous" = "--publish" ] && publish=$1
    previous=$1; shift
done
host=${publish%:*}
PATH="$(dirname "$0"):$PATH" exec sh "$@" --bind "${host%:*}" --port "${host#*:}"
"""
ENTRYPOINT = '#!/bin/sh\nexec "$@"\n'


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, text in (("docker", ENGINE), ("docker-entrypoint.sh", ENTRYPOINT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return "docker"


async def test_an_engine_is_found_by_its_answer(engine: str) -> None:
    assert await container_engine() == engine


async def test_redis_in_a_container_answers_and_stops(engine: str, tmp_path: Path) -> None:
    server = await containers.start_redis(engine, tmp_path, ProgressStep("test"))
    assert (await check_redis(server.url)).split()[0] in {"Redis", "Valkey"}
    running = _family(server.processes[0].pid)
    assert "redis-server" in {process.name() for process in running}
    await server.stop()
    assert leftovers(running) == []


async def test_a_container_ends_when_its_client_is_killed(engine: str, tmp_path: Path) -> None:
    server = await containers.start_redis(engine, tmp_path, ProgressStep("test"))
    (client,) = server.processes
    redis = next(process for process in _family(client.pid) if process.name() == "redis-server")
    # Closing its input is what the engine does when its client goes away.
    client.close_input()
    await asyncio.sleep(0.1)
    assert leftovers([redis]) == []
    await server.stop()


async def test_an_image_that_cannot_be_fetched_is_reported_with_what_to_do(engine: str, tmp_path: Path) -> None:
    (tmp_path / "docker").write_text('#!/bin/sh\n[ "$1" = pull ] && echo "no such host"\nexit 1\n')
    with pytest.raises(BrokersError, match=r"(?s)no such host.*docker pull.*WISP_REDIS_URL"):
        await containers.start_redis(engine, tmp_path, ProgressStep("test"))


def _family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *descendants(pid)]
