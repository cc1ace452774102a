"""The whole suite on a RabbitMQ cluster of three nodes, which are killed, stopped and frozen under six streams."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import httpx
import pytest
from asking import Case, decode
from patience import HANG_S
from rabbitmq_cluster import rabbitmq_cluster, until_redundant

from services.tools.bench.support.tiny import tiny_model
from services.tools.local.brokers import Brokers
from services.tools.local.servers import BrokerServer
from services.tools.local.stack import Stack
from shared.engine import Engine
from shared.messages import Sampling
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

pytestmark = pytest.mark.slow

STREAMS = 6
TOKENS = 64
LONGEST_GAP_S = 10.0
"""On a machine that has nothing else to do; `Streams.patience` says what the others add."""
BATCH_MS = 10
"""So that six streams leave the cores to a node that starts."""
NODES = 3
FROZEN = 1
"""The node that the schedulers and estimators prefer, so that it has the one consumer of the rounds."""
FROZEN_GAP_S = 20.0
"""It takes up to 10 s on a machine that is busy with other tests, and over 30 s without `shared.broker.silence`."""
BACK_S = 12.0
"""Time in which a node that hung joins the others again, by a restart."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def answers(tiny: Path) -> list[Case]:
    folder = ModelFolder(tiny)
    tokenizer, engine = Tokenizer(folder), Engine(tiny, budget_tokens=4096)
    found = []
    for number in range(STREAMS):
        prompt = tokenizer.render_chat([{"role": "user", "content": f"Question {number}"}])
        sampling = Sampling(temperature=1.0, seed=number)
        found.append(Case(prompt, sampling, decode(engine, prompt, sampling, set(folder.eos_ids), length=TOKENS)))
    return found


@pytest.fixture(scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[BrokerServer]]:
    async with rabbitmq_cluster(tmp_path_factory.mktemp("cluster"), NODES) as running:
        yield running


@pytest.fixture(scope="module")
async def suite(brokers: Brokers, nodes: list[BrokerServer], tiny: Path) -> AsyncIterator[Stack]:
    """Two processes of each service but the gateway; each service prefers another node."""
    urls = [node.url for node in nodes]
    services = ("gateway", "scheduler", "verifier", "drafter", "estimator")
    env_of = {
        service: {"WISP_AMQP_URL": ",".join([*urls[first % NODES :], *urls[: first % NODES]])}
        for first, service in enumerate(services)
    }
    env_of["verifier"] |= {
        "WISP_PROFILE": "false",
        "WISP_EMULATED_COST": json.dumps([BATCH_MS, 0, 0, 0, 0, 0, 0]),
    }
    env = {
        "WISP_REPLICATED_QUEUES": "true",
        "WISP_THREADS": "1",
        "WISP_CACHE_TOKENS": "4096",
        "WISP_ADMISSION": "false",
    }
    async with Stack(
        "test-cluster", brokers=brokers, target=tiny, drafters=2, schedulers=2, verifiers=2, env=env, env_of=env_of
    ) as running:
        yield running


@dataclass
class Streams:
    """Clients that send one streamed request after the other, and record the longest silence."""

    url: str
    model: str
    over: asyncio.Event = field(default_factory=asyncio.Event)
    gaps_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ended: dict[int, int] = field(default_factory=dict)
    """Whole answers by client."""
    patience: float = 0.0
    """Seconds that a gap may be longer on a busy machine: many times the longest one before anything happened."""

    async def ask(self, http: httpx.AsyncClient, number: int, case: Case) -> None:
        """Send a request again and again until the end."""
        self.ended[number] = 0
        while not self.over.is_set():
            tokens: list[int] = []
            before_s = monotonic()
            body = {
                "model": self.model,
                "prompt": case.prompt,
                "max_tokens": TOKENS,
                "stream": True,
                **case.sampling.model_dump(),
                "wisp": {"trace": True},
            }
            async with http.stream("POST", f"{self.url}/completions", json=body) as answer:
                if answer.status_code != 200:
                    self.wrong.append((await answer.aread()).decode())
                    return
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        self.wrong.append(json.dumps(event["error"]))
                        return
                    self.gaps_s.append(monotonic() - before_s)
                    before_s = monotonic()
                    tokens += [token["id"] for token in event.get("wisp", {}).get("tokens", ())]
            if tokens != case.tokens:
                self.wrong.append(f"{tokens}, not {case.tokens}")
            self.ended[number] += 1

    async def go_on(self) -> None:
        """Wait until each client has sent a request and has its whole answer, or something went wrong."""
        # One may be running now.
        goal = {number: ended + 2 for number, ended in self.ended.items()}
        async with asyncio.timeout(HANG_S):
            while not self.wrong and any(self.ended[one] < wanted for one, wanted in goal.items()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@asynccontextmanager
async def streaming(suite: Stack, answers: list[Case]) -> AsyncIterator[Streams]:
    """Run the clients during the context; then none of their answers may be wrong or late."""
    streams = Streams(suite.url, suite.target.name)
    async with httpx.AsyncClient(timeout=HANG_S) as http, asyncio.TaskGroup() as tasks:
        for number, case in enumerate(answers):
            tasks.create_task(streams.ask(http, number, case))
        await asyncio.sleep(0)
        await streams.go_on()
        streams.patience = 20 * max(streams.gaps_s, default=0.0)
        yield streams
        streams.over.set()
    assert not streams.wrong
    print(f"longest gap {max(streams.gaps_s):.1f} s of {len(streams.gaps_s)}, {streams.patience:.1f} s of patience")


async def test_no_stream_notices_a_frozen_node(suite: Stack, nodes: list[BrokerServer], answers: list[Case]) -> None:
    """A frozen node answers nothing and closes nothing. The first test, as later the connections are elsewhere."""
    async with streaming(suite, answers) as streams:
        nodes[FROZEN].processes[0].send(signal.SIGSTOP)
        try:
            await streams.go_on()
            assert not streams.wrong
        finally:
            nodes[FROZEN].processes[0].send(signal.SIGCONT)
        await asyncio.sleep(BACK_S)
        await until_redundant(nodes[0])
        await streams.go_on()
    assert max(streams.gaps_s) <= FROZEN_GAP_S + streams.patience


@pytest.mark.parametrize("loss", ["kill", "stop"])
@pytest.mark.parametrize("number", range(NODES))
async def test_no_stream_notices_the_loss_of_a_node(
    suite: Stack, nodes: list[BrokerServer], answers: list[Case], number: int, loss: str
) -> None:
    await until_redundant(nodes[number])
    async with streaming(suite, answers) as streams:
        if loss == "kill":
            await nodes[number].kill()
        else:
            await nodes[number].processes[0].stop()
        await streams.go_on()
        await nodes[number].restart()
        await streams.go_on()
    assert max(streams.gaps_s) <= LONGEST_GAP_S + streams.patience
