"""A verifier process that is frozen until its sessions have moved to other verifiers, and then wakes up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import builders
import pytest
from gateway_peer import eventually
from patience import HANG_S
from redis.asyncio import Redis

from services.tools.bench.support.tiny import tiny_model
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.engine import Engine, Step
from shared.messages import Heartbeat, Message, Result, RunGrant, Sampling, Status
from shared.models.folder import ModelFolder
from shared.sampling.sampler import choose
from shared.state.commits import Commit
from shared.state.store import Store

LONG = 1000
"""Tokens of a long prompt."""
SESSIONS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@dataclass
class Zombie:
    """A verifier process, with the test in place of scheduler and drafter."""

    process: asyncio.subprocess.Process
    broker: Broker
    store: Store
    redis: Redis
    lease_key: str
    fingerprint: str
    leases: list[int] = field(default_factory=list)
    """Lease in each of its heartbeats."""
    held: list[set[str]] = field(default_factory=list)
    """Cached sessions in each of its heartbeats."""
    results: list[Result] = field(default_factory=list)
    log: bytes = b""

    async def receive(self, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self.leases.append(message.lease)
            self.held.append({held.session for held in message.residency})
        elif isinstance(message, Result):
            self.results.append(message)

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.log += line

    async def open(self, session: str, prompt: list[int], max_tokens: int = 10) -> None:
        request = builders.stored_request(
            session, prompt_len=len(prompt), stop_ids=[], max_tokens=max_tokens, fingerprint=self.fingerprint
        )
        await self.store.create(request, prompt)

    async def send(
        self, name: str, sessions: dict[str, int], *, prefill_to: int | None = None, run: RunGrant | None = None
    ) -> None:
        """Send a batch with one round of each session (committed length by session), under the last lease."""
        jobs = [
            builders.job(session, 0, length, prefill_to=prefill_to, run=run, fingerprint=self.fingerprint)
            for session, length in sessions.items()
        ]
        batch = builders.batch(name, *jobs, lease=self.leases[-1])
        await self.broker.publish(batch, topology.batch("v1"), confirmed=True)

    async def send_until(self, held: set[str], name: str, sessions: dict[str, int]) -> None:
        """Send a batch until these sessions are cached: again under each new lease, as a scheduler sends it again.

        On a busy machine a lease may end between the heartbeat that named it and the batch, which is dropped then.
        """
        lease = None
        async with asyncio.timeout(HANG_S):
            while self.held[-1] != held:
                if self.leases[-1] != lease:
                    lease = self.leases[-1]
                    await self.send(name, sessions)
                await asyncio.sleep(0.05)

    async def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    async def gone(self) -> None:
        """Wait until its lease has ended.

        The lease is taken before the first heartbeat and may end after the last one, so it has to be asked for itself.
        """
        async with asyncio.timeout(HANG_S):
            while await self.redis.exists(self.lease_key):  # noqa: ASYNC110 - Redis has no event for it
                await asyncio.sleep(0.05)

    async def wake(self) -> None:
        """Resume the process and wait for a heartbeat with a new lease."""
        before = self.leases[-1]
        self.process.send_signal(signal.SIGCONT)
        await eventually(lambda: self.leases[-1] != before)

    async def tokens(self, session: str) -> list[int]:
        (stored,) = await self.store.read([session])
        assert stored is not None
        return stored.tokens


@pytest.fixture
async def zombie(amqp_url: str, redis_url: str, namespace: str, model: Path) -> AsyncIterator[Zombie]:
    environment = os.environ | {"WISP_AMQP_URL": amqp_url, "WISP_REDIS_URL": redis_url, "WISP_NAMESPACE": namespace}
    environment |= {"WISP_TARGET": str(model), "WISP_INSTANCE": "v1", "WISP_PROFILE": "false"}
    environment |= {"WISP_LOG_LEVEL": "debug"}
    # A batch of long prompts takes two seconds, others no time.
    environment |= {"WISP_EMULATED_COST": json.dumps([0, 0, 2000 / (SESSIONS * LONG), 0, 0, 0, 0])}
    broker = await Broker.connect(amqp_url, Topology(namespace), "peer")
    store = Store.connect(redis_url, namespace, 60)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.verifier", env=environment, stderr=asyncio.subprocess.PIPE
    )
    redis = Redis.from_url(redis_url)
    fingerprint = ModelFolder(model).fingerprint("bfloat16")
    it = Zombie(process, broker, store, redis, f"{namespace}:lease:v1", fingerprint)
    keys = (topology.heartbeat("*"), topology.result("d"), topology.RESULT_SCHEDULER)
    await broker.consume(broker.topology.own_queue("test", "x", keys), it.receive)
    reading = asyncio.create_task(it.read_log())
    try:
        await eventually(lambda: bool(it.leases))
        yield it
    finally:
        process.kill()
        await process.wait()
        await reading
        await broker.close()
        await store.close()
        await redis.aclose()


def prompt(number: int, length: int) -> list[int]:
    return [3 + (number + 7 * place) % 200 for place in range(length)]


def answer(model: Path, tokens: list[int]) -> int:
    """Return the model's next token."""
    engine = Engine(model, budget_tokens=2048)
    engine.attach("s", tokens)
    return choose(engine.forward([Step("s", tokens)]).logits, [Sampling()], [len(tokens)])[0]


async def test_batches_sent_under_an_ended_lease_are_dropped(zombie: Zombie, model: Path) -> None:
    first, second = prompt(1, 20), prompt(2, 30)
    await zombie.open("s", first)
    await zombie.open("t", second)
    await zombie.freeze()
    await zombie.send("b1", {"s": 20, "t": 30})
    await zombie.send("b2", {"t": 30}, prefill_to=16)
    await zombie.gone()
    (other,) = await zombie.store.commit("v2", [Commit("s", 0, 20, 0, [answer(model, first)], None, 20)])
    await zombie.wake()
    await eventually(
        lambda: zombie.log.count(b"batch of an ended lease dropped") + zombie.log.count(b"results dropped") == 2
    )
    assert zombie.results == []
    assert await zombie.tokens("s") == first + other.tokens
    assert await zombie.tokens("t") == second
    await zombie.send("b3", {"s": 21, "t": 30})  # it works again under its new lease
    await eventually(lambda: len(zombie.results) == 2)
    assert {result.status for result in zombie.results} == {Status.COMMITTED}
    assert await zombie.tokens("t") == [*second, answer(model, second)]


async def test_a_verifier_frozen_within_a_batch_commits_nothing_of_it(zombie: Zombie) -> None:
    prompts = {f"s{number}": prompt(number, LONG) for number in range(SESSIONS)}
    for session, tokens in prompts.items():
        await zombie.open(session, tokens)
    await zombie.send("b1", dict.fromkeys(prompts, LONG))
    await eventually(lambda: b"model started" in zombie.log)
    await zombie.freeze()
    await asyncio.sleep(0.2)
    assert b"model done" not in zombie.log, "the batch is too short to be frozen in the middle"
    await zombie.gone()
    await zombie.wake()
    await eventually(lambda: b"results dropped" in zombie.log)
    assert zombie.results == []
    for session, tokens in prompts.items():
        assert await zombie.tokens(session) == tokens


async def test_a_verifier_frozen_within_a_run_commits_nothing_more_of_it(zombie: Zombie, model: Path) -> None:
    most = 900
    await zombie.open("s", prompt(1, 20), most)
    await zombie.send("b1", {"s": 20}, run=RunGrant(tokens=most - 1, ms=HANG_S * 1000))
    await eventually(lambda: any(result.run for result in zombie.results))
    await zombie.freeze()
    await zombie.gone()
    held = await zombie.tokens("s")
    assert len(held) < 20 + most, "the run is too short to be frozen in the middle"
    await zombie.wake()
    await zombie.send("b2", {"s": len(held)})  # it works again under its new lease
    await eventually(lambda: any(result.batch == "b2" for result in zombie.results))
    (result,) = (result for result in zombie.results if result.batch == "b2")
    assert (result.status, result.tokens) == (Status.COMMITTED, [answer(model, held)])
    assert await zombie.tokens("s") == [*held, *result.tokens], "no token of the run came after its lease"


async def test_kv_of_sessions_that_ended_meanwhile_is_freed(zombie: Zombie) -> None:
    for session in ("ends", "stays"):
        await zombie.open(session, prompt(3, 100))
    await zombie.send_until({"ends", "stays"}, "b1", {"ends": 100, "stays": 100})
    await zombie.freeze()
    await zombie.gone()
    await zombie.store.cancel("ends")  # without a message: no scheduler sends it any more
    await zombie.wake()
    await eventually(lambda: zombie.held[-1] == {"stays"})
