"""The benchmarks of one stream, of its rounds and of a gateway's streams, each on a real suite."""

from __future__ import annotations

from pathlib import Path

from openai import AsyncOpenAI

from services.tools.bench import gateway
from services.tools.bench.rounds.__main__ import WARM_UP_ROUNDS, measure, outside_model
from services.tools.bench.stream.bare_engine import BareEngine
from services.tools.bench.stream.cases import cases
from services.tools.bench.stream.core import speed
from services.tools.bench.stream.measurement import BLOCK, StreamPlan, TimedSuite
from services.tools.local.brokers import Brokers
from services.tools.local.progress import Progress
from services.tools.local.stack import Stack
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

TOKENS = 12


async def test_requests_are_timed_and_equal_with_and_without_drafts(stack: Stack) -> None:
    asked = cases(["summary", "completion"], 1, [0.7], 0, Tokenizer(ModelFolder(stack.target)))
    assert len(asked[0].prompt_ids) > BLOCK
    plan = StreamPlan(stack.target, "bfloat16", 1, ["none", "lookup"], [0.0], [0.7], TOKENS, asked)
    async with AsyncOpenAI(base_url=stack.url, api_key="none", max_retries=0) as client:
        suite = TimedSuite(client, plan, 0.0)
        timed = []
        engine = BareEngine(stack.target, plan.dtype, plan.threads, plan.cache_tokens)
        for case in asked:
            for arm in plan.arms:
                one, answer = await suite.ask(case, arm, TOKENS)
                assert 0 < one.first_s <= one.total_s
                assert sum(len(made.tokens) for made in answer.rounds) == len(one.tokens)
                assert len(answer.rounds) == one.summary["rounds"]
                assert sum(made.verify_ms for made in answer.rounds) > 0
                timed.append(one)
            alone = engine.generate(speed.ENGINE, case.prompt_ids, one.made, case.temperature, case.seed)
            assert alone.tokens[: len(one.tokens)] == one.tokens, "the engine alone gives the suite's text"
            assert 0 < alone.first_s < alone.total_s
    assert speed.differences(timed) == []
    assert [one.made for one in timed if one.arm == "none"] == [
        one.summary["rounds"] for one in timed if one.arm == "none"
    ], "a round of plain decoding gives one token"


async def test_each_round_of_an_idle_suite_is_timed_by_hop(brokers: Brokers, target_folder: Path) -> None:
    rounds, memory = await measure(10, target_folder, brokers)
    assert len(rounds) == 10, f"{WARM_UP_ROUNDS} more are not counted"
    assert all(0 < outside_model(times) < times["round settled"] - times["round sent"] for times in rounds)
    assert {"gateway-1", "scheduler-1"} <= {name for name, _ in memory}
    assert all(megabytes > 0 for _, megabytes in memory)


async def test_a_gateways_streams_are_timed_for_the_default_model(brokers: Brokers, target_folder: Path) -> None:
    (row,) = await gateway.measure(target_folder, 4, [80], 4, 32, 2.0, Progress(), brokers)
    measured = dict(zip(gateway.COLUMNS, row, strict=True))
    assert measured["received"] > 0
    assert measured["median ms"] > 0
    assert 0 <= measured["added, median ms"] <= measured["added, 99 % ms"]
    assert measured["us of CPU a token"] > 0
