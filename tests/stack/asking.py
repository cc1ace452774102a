"""Requests for stack tests: questions, the target's own completions, a client, and the observed traffic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from patience import HANG_S

from services.tools.local.stack import Stack
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.engine import Engine, Step
from shared.messages import Message, Result, Sampling, Verify
from shared.sampling.rules import LogitsProcessor
from shared.sampling.sampler import choose

TOKENS = 16

QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Repeat this list exactly three times: red, green, blue, yellow.",
    "Write a short Python function that adds two numbers, then the same function again.",
    "Explain in one paragraph why the sky is blue.",
    "Say 'hello' in five languages: 12345, 67890, 你好, 🙂.",
    "Summarise: The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog.",
]
SAMPLINGS = [Sampling(), Sampling(temperature=1.0, seed=1234), Sampling(temperature=0.8, top_p=0.9, top_k=50, seed=-7)]


@dataclass(frozen=True)
class Case:
    """A request and the tokens of the target's own completion, without the token that ends it."""

    prompt: list[int]
    sampling: Sampling
    tokens: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the request: those that `sampling.rules` stands for."""


@dataclass
class Traffic:
    """Observed rounds and results, as a standby scheduler receives them."""

    results: list[Result] = field(default_factory=list)
    rounds: list[Verify] = field(default_factory=list)

    def clear(self) -> None:
        self.results.clear()
        self.rounds.clear()

    @property
    def verifiers(self) -> set[str]:
        """Verifiers that have committed tokens."""
        return {result.verifier for result in self.results if result.tokens}

    @property
    def schedulers(self) -> set[str]:
        """Schedulers whose batches have results."""
        return {result.batch.rpartition("-")[0] for result in self.results if not result.run}

    @property
    def drafters(self) -> set[str]:
        """Drafters that have sent rounds."""
        return {round_.drafter for round_ in self.rounds}


class Client:
    """A client that sends token ids and returns the committed tokens."""

    def __init__(self, http: httpx.AsyncClient, stack: Stack) -> None:
        self.http = http
        self._stack = stack

    async def ask(self, case: Case, draft: str = "auto", headers: dict[str, str] | None = None) -> list[int]:
        """Send a request; return the answer's tokens."""
        answer = await self.http.post(
            f"{self._stack.url}/completions", json=self.body(case, draft), headers=headers or {}
        )
        assert answer.status_code == 200, answer.text
        return [token["id"] for token in answer.json()["wisp"]["tokens"]]

    def body(self, case: Case, draft: str) -> dict[str, Any]:
        return {
            "model": self._stack.target.name,
            "prompt": case.prompt,
            "max_tokens": TOKENS,
            **case.sampling.model_dump(exclude={"rules"}),
            **case.options,
            "wisp": {"trace": True, "draft": draft},
        }

    async def ask_all(self, cases: Sequence[Case], draft: str = "auto") -> list[list[int]]:
        """Send all requests at once."""
        return await asyncio.gather(*(self.ask(case, draft) for case in cases))


def decode(
    engine: Engine, prompt: Sequence[int], sampling: Sampling, eos: set[int], *, length: int = TOKENS
) -> list[int]:
    """Decode the target's own completion token by token, without the token that ends it.

    The engine keeps the session, so that the next completion of the same prompt does not compute it again.
    """
    tokens = list(prompt)
    engine.attach("reference", tokens)
    while len(tokens) < len(prompt) + length and (len(tokens) == len(prompt) or tokens[-1] not in eos):
        step = Step("reference", tokens[engine.cached("reference") :], rows=1)
        rules = LogitsProcessor.of(sampling, tokens)
        tokens += choose(engine.forward([step]).logits, [sampling], [len(tokens)], [rules])
    return [token for token in tokens[len(prompt) :] if token not in eos]


@asynccontextmanager
async def watching(stack: Stack) -> AsyncIterator[Traffic]:
    """Record the traffic between a stack's services, over the brokers' own address."""
    broker = await Broker.connect(stack.brokers.amqp_url, Topology(stack.namespace), "spy")
    seen = Traffic()

    async def see(message: Message) -> None:
        if isinstance(message, Result):
            seen.results.append(message)
        elif isinstance(message, Verify):
            seen.rounds.append(message)

    try:
        await broker.consume(broker.topology.own_queue("spy", "1", (topology.RESULT_SCHEDULER, topology.VERIFY)), see)
        yield seen
    finally:
        await broker.close()


async def progressed(traffic: Traffic, results: int) -> None:
    """Wait until this many results were observed."""
    async with asyncio.timeout(HANG_S):
        while len(traffic.results) < results:  # noqa: ASYNC110 - the spy has no event for a count
            await asyncio.sleep(0.02)
