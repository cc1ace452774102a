"""The measurement of the stream benchmark: one request at a time, to a running stack and to other models in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex

from openai import AsyncOpenAI

from services.tools.bench.stream.cases import question
from services.tools.bench.stream.core import speed
from services.tools.bench.stream.core.speed import Case, TimedRequest
from services.tools.bench.stream.generated import InProcessModel
from services.tools.bench.support.relay import delayed
from services.tools.cli.ask import ClientAnswer, ask, client_at
from services.tools.local.brokers import Brokers
from services.tools.local.folder import RunFolder
from services.tools.local.namespace import delete_namespace
from services.tools.local.progress import Progress, ProgressStep
from services.tools.local.stack import Stack
from shared.kernels.layout import BLOCK

SMALLEST_CACHE = 1024
"""Tokens that the verifier's start-up profile needs."""
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class StreamPlan:
    """The requests to measure, and the stack to measure them on."""

    target: Path
    dtype: str
    threads: int
    arms: list[str]
    """Draft sources of the suite, plain decoding first."""
    delays: list[float]
    temperatures: list[float]
    tokens: int
    cases: list[Case]

    @property
    def cache_tokens(self) -> int:
        """The size of a cache in which one session just fits."""
        longest = max(len(case.prompt_ids) for case in self.cases) + self.tokens
        return max(SMALLEST_CACHE, -(-longest // BLOCK) * BLOCK)


@dataclass(frozen=True)
class SampleAnswer:
    """One drafted answer, to be drawn on the terminal."""

    timed: TimedRequest
    answer: ClientAnswer


class TimedSuite:
    """A running stack that takes one request at a time."""

    def __init__(self, client: AsyncOpenAI, plan: StreamPlan, delay_ms: float) -> None:
        self._client = client
        self._plan = plan
        self._delay_ms = delay_ms
        self._model = plan.target.name

    async def ask(self, case: Case, arm: str, max_tokens: int) -> tuple[TimedRequest, ClientAnswer]:
        """Time one request. Its prompt is not in the prefix cache."""
        if len(case.prompt_ids) > BLOCK:
            await self._fill_cache()
        answer = await ask(self._client, self._model, question(case, max_tokens), arm)
        first = next((one for one in answer.arrivals if one.trace.get("tokens")), None)
        timed = TimedRequest(
            case=case,
            arm=arm,
            delay_ms=self._delay_ms,
            tokens=answer.tokens,
            finish=answer.finish,
            first_s=(first.at_ms if first else answer.total_ms) / 1000,
            first_tokens=len(first.trace["tokens"]) if first else 0,
            total_s=answer.total_ms / 1000,
            summary=answer.summary,
        )
        return timed, answer

    async def _fill_cache(self) -> None:
        filler = [100 + i % 1000 for i in range(self._plan.cache_tokens - 1)]
        await self._client.completions.create(
            model=self._model, prompt=filler, max_tokens=1, temperature=0, extra_body={"wisp": {"draft": "none"}}
        )


class StreamMeasurement:
    """The measurement over all delays, and the answers so far."""

    def __init__(self, plan: StreamPlan, rivals: Sequence[InProcessModel], progress: Progress) -> None:
        self.plan = plan
        self.timed: list[TimedRequest] = []
        self.rivals: list[TimedRequest] = []
        """Answers of the models in this process, measured with the first delay."""
        self.servers: dict[str, str] = {}
        self._models = rivals
        self._progress = progress

    async def run(self, show: Callable[[float, SampleAnswer], None]) -> None:
        """Measure one delay after the other, each on a stack of its own.

        show: called after each delay, with the delay and a drafted answer.
        """
        with RunFolder("bench-stream") as folder:
            async with Brokers(folder.path, progress=self._progress) as brokers:
                self.servers = {"rabbitmq": brokers.rabbitmq_version, "redis": brokers.redis_version}
                for delay_ms in self.plan.delays:
                    async with self._stack(brokers, delay_ms) as stack:
                        sample = await stack.watch(self._one_delay(stack, delay_ms))
                    show(delay_ms, sample)

    @asynccontextmanager
    async def _stack(self, brokers: Brokers, delay_ms: float) -> AsyncIterator[Stack]:
        addresses = {"WISP_AMQP_URL": brokers.amqp_url, "WISP_REDIS_URL": brokers.redis_url}
        async with delayed(addresses, delay_ms / 1000) as delayed_addresses:
            stack = Stack(
                "bench-stream",
                brokers=brokers,
                target=self.plan.target,
                namespace=f"bench-{token_hex(4)}",
                env={"WISP_DTYPE": self.plan.dtype, "WISP_THREADS": str(self.plan.threads)},
                env_of={"drafter": delayed_addresses, "verifier": {"WISP_CACHE_TOKENS": str(self.plan.cache_tokens)}},
                progress=self._progress,
            )
            async with stack:
                yield stack
            if brokers.given:
                await delete_namespace(brokers.amqp_url, brokers.redis_url, stack.namespace, brokers.tls)

    async def _one_delay(self, stack: Stack, delay_ms: float) -> SampleAnswer:
        """Send all requests; return one drafted answer."""
        plan = self.plan
        kinds = len({case.kind for case in plan.cases})
        models = () if self.rivals else self._models
        sample: SampleAnswer | None = None
        async with client_at(stack.url) as client:
            suite = TimedSuite(client, plan, delay_ms)
            with self._progress.step(f"measuring with {delay_ms:g} ms added") as step:
                await self._warm_up(suite, models, step)
                for number, case in enumerate(plan.cases):
                    step.detail(f"{number + 1} of {len(plan.cases)}: {case.name}")
                    answers: dict[str, TimedRequest] = {}
                    turn = number // kinds + number % kinds  # the order alternates within each kind too
                    for arm in _alternating(plan.arms, turn):
                        answers[arm], answer = await suite.ask(case, arm, plan.tokens)
                        if arm == plan.arms[1] and (sample is None or _worth_drawing(case, plan)):
                            sample = SampleAnswer(answers[arm], answer)
                    self.timed += [answers[arm] for arm in plan.arms]
                    for model in models:
                        self.rivals += await self._generate(model, answers[speed.PLAIN], turn)
                step.done(f"{len(plan.cases)} prompts with {', '.join(plan.arms)}, {delay_ms:g} ms added")
        assert sample is not None
        return sample

    async def _warm_up(self, suite: TimedSuite, models: Sequence[InProcessModel], step: ProgressStep) -> None:
        step.detail("warming up")
        case = replace(self.plan.cases[0], temperature=0.0)
        for arm in self.plan.arms:
            timed, _ = await suite.ask(case, arm, WARM_UP_TOKENS)
        for model in models:
            await self._generate(model, timed, 0)

    @staticmethod
    async def _generate(model: InProcessModel, ours: TimedRequest, turn: int) -> list[TimedRequest]:
        """Let a model in this process generate as many tokens as the suite did."""
        case, answers = ours.case, {}
        for arm in _alternating(list(model.arms), turn):
            made = await asyncio.to_thread(model.generate, arm, case.prompt_ids, ours.made, case.temperature, case.seed)
            answers[arm] = TimedRequest(
                case=case,
                arm=arm,
                delay_ms=ours.delay_ms,
                tokens=made.tokens,
                finish="length",
                first_s=made.first_s,
                first_tokens=made.first_tokens,
                total_s=made.total_s,
                agrees=speed.agreement(ours.tokens, made.tokens) if case.temperature == 0 or model.same_text else None,
            )
        return [answers[arm] for arm in model.arms]


def _alternating(arms: list[str], turn: int) -> list[str]:
    return arms if turn % 2 == 0 else arms[::-1]


def _worth_drawing(case: Case, plan: StreamPlan) -> bool:
    return (case.kind, case.number, case.temperature) == ("chat", 0, plan.temperatures[0])
