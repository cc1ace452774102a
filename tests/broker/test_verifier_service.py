"""The verifier as a service, on real brokers and a small random model. The test plays scheduler and drafter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import builders
import numpy as np
import pytest
import redis
import torch
from opentelemetry.sdk.trace import ReadableSpan
from otlp import Recorded, recording
from patience import HANG_S
from prometheus_client import REGISTRY
from pydantic import SecretStr
from random_draft import random_draft

from services.verifier import batches, membership, metrics
from services.verifier.service import serve
from services.verifier.settings import VerifierSettings
from shared import cost
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.session_keys import SessionKeys
from shared.broker.topology import Topology
from shared.cost.fit import VerifierFit
from shared.engine import Engine, Step
from shared.errors import BrokersError
from shared.lookup import LookupText
from shared.messages import (
    MOST,
    SILENT_MS,
    Cancel,
    Finish,
    Halt,
    Heartbeat,
    HiddenFormat,
    HiddenStates,
    Job,
    Measurement,
    Message,
    Release,
    Result,
    RunGrant,
    Sample,
    Sampling,
    Status,
)
from shared.models import hidden_states as hidden
from shared.models.folder import ModelFolder
from shared.models.hidden_states import Floats, unpack
from shared.models.prepare import prepare
from shared.runtime import tracing
from shared.sampling.sampler import choose
from shared.state.commits import Commit, CommitOutcome
from shared.state.registry import HEARTBEAT_TTL_MS
from shared.state.store import Store

PROMPT = [5, 6, 7, 8]
STEP_MS = 5.0
SAMPLING = Sampling(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = prepare("smollm2-135m-instruct", Path(".wisp/models"))
    return random_draft(tmp_path_factory.mktemp("model"), target)


@pytest.fixture(scope="module")
def text(model: Path) -> list[int]:
    """The model's continuation of the prompt."""
    engine = Engine(model, budget_tokens=256)
    tokens = list(PROMPT)
    engine.attach("s", tokens)
    for _ in range(30):
        logits = engine.forward([Step("s", tokens[engine.cached("s") :])]).logits
        tokens += choose(logits, [SAMPLING], [len(tokens)])
    return tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def states(model: Path, text: list[int]) -> Floats:
    """The model's hidden states at every token of prompt and continuation."""
    engine = Engine(model, budget_tokens=256, keep_hidden=True)
    engine.attach("s", [])
    engine.forward([Step("s", PROMPT + text)])
    return engine.hidden("s", 0, len(PROMPT + text)).to(torch.float32).numpy()


@dataclass
class Peer:
    """The test's part in place of the other services."""

    broker: Broker
    store: Store
    results: asyncio.Queue[Message]
    samples: asyncio.Queue[Message]
    fingerprint: str
    leases: list[int]
    """Lease in each heartbeat."""
    batches: int = 0

    async def open(
        self, session: str, max_tokens: int = 100, stop_ids: tuple[int, ...] = (), prompt: Sequence[int] = PROMPT
    ) -> None:
        request = builders.stored_request(
            session,
            prompt_len=len(prompt),
            sampling=SAMPLING,
            stop_ids=list(stop_ids),
            max_tokens=max_tokens,
            fingerprint=self.fingerprint,
        )
        await self.store.create(request, prompt)

    def job(self, session: str, base: int, draft: list[int], round_: int = 0, **more: Any) -> Job:
        return builders.job(session, round_, base, draft, **({"fingerprint": self.fingerprint} | more))

    async def send(self, *jobs: Job, trace: tracing.Headers | None = None) -> None:
        self.batches += 1
        batch = builders.batch(f"b{self.batches}", *jobs)
        await self.broker.publish(batch, topology.batch("v1"), confirmed=True, trace=trace)

    async def begin_run(
        self,
        session: str,
        length: int,
        tokens: int = 64,
        copies: int = 0,
        trace: tracing.Headers | None = None,
        **more: Any,
    ) -> None:
        """Send a plain round of a session after which the verifier may decode so many tokens by itself."""
        job = self.job(session, length, [], run=RunGrant(tokens=tokens, ms=HANG_S * 1000, copies=copies), **more)
        await self.broker.publish(
            builders.batch("begin", job, lease=self.leases[-1]), topology.batch("v1"), confirmed=True, trace=trace
        )

    async def rest_of_run(self) -> list[Result]:
        """Wait for the results of a run up to the last one."""
        found = [await self.result()]
        while found[-1].run_left:
            found.append(await self.result())
        return found

    async def committed(self, session: str) -> list[int]:
        (stored,) = await self.store.read([session])
        assert stored is not None
        return stored.tokens

    async def result(self) -> Result:
        message = await asyncio.wait_for(self.results.get(), HANG_S)
        assert isinstance(message, Result)
        return message

    async def result_and_states(self) -> tuple[Result, list[HiddenStates]]:
        """Wait for the next result; return it with the hidden states that came before it."""
        found = []
        while isinstance(message := await asyncio.wait_for(self.results.get(), HANG_S), HiddenStates):
            found.append(message)
        assert isinstance(message, Result)
        return message, found

    async def verify(self, *jobs: Job) -> list[Result]:
        await self.send(*jobs)
        found = {result.session: result for result in [await self.result() for _ in jobs]}
        return [found[job.session] for job in jobs]


@pytest.fixture
async def peer(amqp_url: str, redis_url: str, namespace: str, model: Path) -> AsyncIterator[Peer]:
    async with playing(amqp_url, redis_url, namespace, model) as found:
        yield found


@asynccontextmanager
async def playing(
    amqp_url: str,
    redis_url: str,
    namespace: str,
    model: Path,
    secret: str | None = None,
    emulated_cost: Sequence[float] = (STEP_MS, 0, 0, 0, 0, 0, 0),
) -> AsyncIterator[Peer]:
    """Run a verifier, with the test in place of the other services."""
    broker = await Broker.connect(amqp_url, Topology(namespace), "peer")
    store = Store.connect(redis_url, namespace, 60)
    results: asyncio.Queue[Message] = asyncio.Queue()
    samples: asyncio.Queue[Message] = asyncio.Queue()
    alive = asyncio.Event()
    leases: list[int] = []

    async def receive(message: Message) -> None:
        if isinstance(message, Heartbeat) and message.lease:
            leases.append(message.lease)
            alive.set()

    await broker.consume(broker.topology.own_queue("drafter", "d", (topology.result("d"),)), results.put)
    await broker.consume(broker.topology.own_queue("scheduler", "x", (topology.heartbeat("*"),)), receive)
    await broker.consume(broker.topology.sample_queue(), samples.put)
    settings = VerifierSettings(
        amqp_url=amqp_url,
        redis_url=redis_url,
        namespace=namespace,
        target=model,
        profile=False,
        cache_tokens=1024,
        session_secret=None if secret is None else SecretStr(secret),
        # So that a run lasts while something happens to it.
        emulated_cost=list(emulated_cost),
    )
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(settings, "v1", stop))
    await asyncio.wait_for(alive.wait(), HANG_S)
    async with asyncio.timeout(HANG_S):
        while not await store.registry.heartbeats():  # noqa: ASYNC110 - a heartbeat is published before it is stored
            await asyncio.sleep(0.01)
    yield Peer(broker, store, results, samples, ModelFolder(model).fingerprint("bfloat16"), leases)
    stop.set()
    await asyncio.wait_for(serving, HANG_S)
    await broker.close()
    await store.close()


def kept_alive(redis_url: str, namespace: str, seconds: float) -> list[tuple[bytes | None, bool]]:
    """Block the event loop; return the verifier's lease, and whether it has a heartbeat, at many times meanwhile."""
    seen = []
    with redis.Redis.from_url(redis_url) as client:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            lease, heartbeat = client.mget(f"{namespace}:lease:v1", f"{namespace}:verifier:v1")
            seen.append((lease, heartbeat is not None))
            time.sleep(0.05)
    return seen


async def test_a_busy_event_loop_holds_up_no_heartbeat(
    peer: Peer, redis_url: str, namespace: str, text: list[int]
) -> None:
    seen = kept_alive(redis_url, namespace, 2 * SILENT_MS / 1000)  # the verifier runs in this event loop
    assert {heartbeat for _, heartbeat in seen} == {True}
    assert len({lease for lease, _ in seen}) == 1
    await peer.open("s")
    (result,) = await peer.verify(peer.job("s", 4, text[:2]))
    assert result.status is Status.COMMITTED


async def test_a_verifier_whose_event_loop_hangs_for_long_sends_no_heartbeats(
    peer: Peer, redis_url: str, namespace: str, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "HANGING_S", 1.0)
    seen = kept_alive(redis_url, namespace, 1.0 + HEARTBEAT_TTL_MS / 1000 + 2)
    assert seen[0][1]
    assert not seen[-1][1]
    await peer.open("s")
    (result,) = await peer.verify(peer.job("s", 4, text[:2]))
    assert result.status is Status.COMMITTED


async def test_a_job_with_a_wrong_session_key_fails_for_the_scheduler_only(
    amqp_url: str, redis_url: str, namespace: str, model: Path, text: list[int]
) -> None:
    session_keys = SessionKeys("x" * 40)
    async with playing(amqp_url, redis_url, namespace, model, "x" * 40) as peer:
        for_scheduler: asyncio.Queue[Message] = asyncio.Queue()
        await peer.broker.consume(
            peer.broker.topology.own_queue("scheduler", "y", (topology.RESULT_SCHEDULER,)), for_scheduler.put
        )
        for session in ("mine", "others"):
            await peer.open(session)
        key = session_keys.key("mine", "g", "default", None)
        await peer.send(
            peer.job("others", 4, text[:2], session_key=key),
            peer.job("others", 4, text[:2]),
            peer.job("mine", 4, text[:2], session_key=key, tpot_ms=1.0),
        )
        for _ in range(3):
            refused = await asyncio.wait_for(for_scheduler.get(), HANG_S)
            assert isinstance(refused, Result)
            assert refused.error is not None
            assert (refused.status, refused.error.code, refused.tokens) == (Status.FAILED, "forbidden", [])
        assert await peer.committed("others") == PROMPT
        (good,) = await peer.verify(peer.job("mine", 4, text[:2], session_key=key))
        assert good.tokens == text[:3]
        assert peer.results.empty(), "the drafter gets no result of a refused job"


async def test_the_accepted_draft_is_committed_with_the_bonus_token(peer: Peer, text: list[int]) -> None:
    await peer.open("s")
    (result,) = await peer.verify(peer.job("s", 4, [text[0], text[1], text[2] + 1]))
    assert (result.status, result.accepted, result.tokens) == (Status.COMMITTED, 2, text[:3])
    assert (result.trimmed_to, result.cached, result.verifier) == (3, 6, "v1")
    assert await peer.committed("s") == PROMPT + text[:3]
    measured = await asyncio.wait_for(peer.samples.get(), HANG_S)
    assert isinstance(measured, Sample)
    assert measured.batches[0].shape.new_tokens == 7


async def test_copies_of_a_round_are_committed_once(peer: Peer, text: list[int]) -> None:
    await peer.open("s")
    base = 4
    for round_ in range(6):
        job = peer.job("s", base, [text[base - 4], 1], round_)
        await peer.send(job)
        await peer.send(job)
        await peer.send(job)
        answers = [await peer.result() for _ in range(3)]
        assert {answer.status for answer in answers} == {Status.COMMITTED}
        assert len({tuple(answer.tokens) for answer in answers}) == 1
        base += len(answers[0].tokens)
    assert await peer.committed("s") == (PROMPT + text)[:base]


def commits(outcome: CommitOutcome) -> float:
    return REGISTRY.get_sample_value("wisp_verifier_commits_total", {"outcome": outcome}) or 0.0


async def test_a_stale_round_gets_the_committed_tokens(peer: Peer, text: list[int]) -> None:
    before = [commits(outcome) for outcome in (CommitOutcome.COMMITTED, CommitOutcome.CONFLICT)]
    await peer.open("s")
    await peer.verify(peer.job("s", 4, text[:3]))
    (stale,) = await peer.verify(peer.job("s", 5, [1], round_=7))
    assert (stale.status, stale.base_len, stale.tokens) == (Status.CONFLICT, 5, text[1:4])
    (ahead,) = await peer.verify(peer.job("s", 20, [1], round_=8))
    assert (ahead.status, ahead.base_len, ahead.tokens) == (Status.CONFLICT, 8, [])
    after = [commits(outcome) for outcome in (CommitOutcome.COMMITTED, CommitOutcome.CONFLICT)]
    assert after == [before[0] + 1, before[1] + 2]


async def test_a_stop_token_and_the_length_end_the_session(peer: Peer, text: list[int]) -> None:
    await peer.open("stops", stop_ids=(text[2],))
    await peer.open("fills", max_tokens=2)
    stops, fills = await peer.verify(peer.job("stops", 4, text[:5]), peer.job("fills", 4, text[:5]))
    first = text.index(text[2])
    assert (stops.finish, stops.tokens) == (Finish.STOP, text[: first + 1])
    assert (fills.finish, fills.tokens) == (Finish.LENGTH, text[:2])


async def test_one_bad_job_fails_alone(peer: Peer, text: list[int]) -> None:
    for session in ("good", "left"):
        await peer.open(session)
    await peer.open("bad", prompt=PROMPT * 300)
    await peer.store.cancel("left")
    jobs = [
        peer.job("good", 4, text[:2]),
        peer.job("bad", 1200, []),
        peer.job("left", 4, []),
        peer.job("gone", 4, []),
    ]
    good, bad, left, gone = await peer.verify(*jobs)
    assert good.tokens == text[:3]
    errors = [result.error and result.error.code for result in (bad, left, gone)]
    assert errors == ["context_length_exceeded", "cancelled", "session_gone"]


async def test_a_draft_ends_before_the_first_id_outside_the_vocabulary(peer: Peer, text: list[int]) -> None:
    await peer.open("s")
    (result,) = await peer.verify(peer.job("s", 4, [text[0], 10**6, text[2]]))
    assert (result.status, result.accepted, result.trimmed_to, result.tokens) == (Status.COMMITTED, 1, 1, text[:2])
    (result,) = await peer.verify(peer.job("s", 6, [2**31 - 1] * 10_000, round_=1))
    assert (result.status, result.tokens) == (Status.COMMITTED, text[2:3])


async def test_the_result_of_a_prefill_chunk_goes_to_gateway_and_scheduler(peer: Peer, text: list[int]) -> None:
    chunks: asyncio.Queue[Message] = asyncio.Queue()
    for service, key in (("gateway", topology.result("g")), ("scheduler", topology.RESULT_SCHEDULER)):
        await peer.broker.consume(peer.broker.topology.own_queue(service, "y", (key,)), chunks.put)
    await peer.open("s")
    await peer.send(peer.job("s", 4, [], prefill_to=2))
    for _ in range(2):
        chunk = await asyncio.wait_for(chunks.get(), HANG_S)
        assert isinstance(chunk, Result)
        assert (chunk.status, chunk.cached) == (Status.PREFILLED, 2)
    (result,) = await peer.verify(peer.job("s", 4, text[:1]))
    assert result.status is Status.COMMITTED, "the drafter gets no result of the chunk"
    assert result.new_tokens == 3, "two of the prompt's four tokens were cached already"


async def test_released_sessions_free_their_kv_and_can_come_back(peer: Peer, text: list[int]) -> None:
    async def held() -> set[str]:
        (beat,) = await peer.store.registry.heartbeats()
        return {one.session for one in beat.residency}

    async def until(session: str, cached: bool) -> None:
        async with asyncio.timeout(HANG_S):
            while (session in await held()) is not cached:  # noqa: ASYNC110 - the store has no event for heartbeats
                await asyncio.sleep(0.05)

    await peer.open("moved")
    await peer.verify(peer.job("moved", len(PROMPT), text[:2]))
    await until("moved", cached=True)
    await peer.broker.publish(Release(sessions=["moved", "unknown"]), topology.batch("v1"), confirmed=True)
    await until("moved", cached=False)
    (result,) = await peer.verify(peer.job("moved", len(PROMPT) + 3, text[3:5], round_=1))
    assert result.tokens == text[3:6]


async def test_a_drafter_gets_hidden_states_before_its_result_if_it_asks(
    peer: Peer, text: list[int], states: Floats
) -> None:
    for session in ("asks", "quiet"):
        await peer.open(session)
    await peer.send(
        peer.job("asks", 4, [text[0], text[1] + 1], hidden_from=0),
        peer.job("quiet", 4, [text[0], text[1] + 1]),
    )
    replies = {result.session: (result, found) for result, found in [await peer.result_and_states() for _ in range(2)]}
    result, (found,) = replies["asks"]
    assert (result.tokens, found.session, found.round, found.start) == (text[:2], "asks", 0, 0)
    assert np.array_equal(unpack(found), states[:5]), "of the prompt and the accepted draft token"
    quiet, none = replies["quiet"]
    assert (quiet.tokens, none) == (text[:2], [])
    await peer.send(peer.job("asks", 6, text[2:4], round_=1, hidden_from=5))
    _, (found,) = await peer.result_and_states()
    assert found.start == 5
    assert np.array_equal(unpack(found), states[5:8])


async def test_hidden_states_in_int8(peer: Peer, text: list[int], states: Floats) -> None:
    await peer.open("s")
    await peer.send(peer.job("s", 4, text[:3], hidden_from=1, hidden_format=HiddenFormat.INT8))
    _, (found,) = await peer.result_and_states()
    assert len(found.rows) == 6 * 64
    assert np.allclose(unpack(found), states[1:7], atol=np.abs(states).max() / 254)


async def test_hidden_states_of_a_long_prompt_come_in_parts(
    peer: Peer, text: list[int], states: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden, "PART_BYTES", 10 * 64 * 2)
    prompt = PROMPT + text[:21]
    await peer.open("s", prompt=prompt)
    await peer.open("short")
    await peer.send(
        peer.job("s", 25, [text[21]], hidden_from=0), peer.job("short", 4, [], hidden_from=3), peer.job("gone", 4, [])
    )
    order = [await peer.result_and_states() for _ in range(3)]
    assert [result.session for result, _ in order] == ["gone", "short", "s"], "long hidden states come last"
    _, found = order[-1]
    assert [(part.start, part.count) for part in found] == [(0, 10), (10, 10), (20, 6)]
    assert np.array_equal(np.concatenate([unpack(part) for part in found]), states[:26])


async def test_only_hidden_states_of_committed_tokens_are_sent(peer: Peer, text: list[int], states: Floats) -> None:
    await peer.open("s")
    job = peer.job("s", 4, text[:2], hidden_from=0)
    for _ in range(3):
        await peer.send(job)
    for _ in range(3):  # a copy is verified again, or gets the committed tokens without hidden states
        result, found = await peer.result_and_states()
        assert result.status is Status.COMMITTED
        assert all(np.array_equal(unpack(part), states[:6]) for part in found)
    for stale, base in ((1, 5), (2, 20)):
        await peer.send(peer.job("s", base, [1], round_=10 + stale, hidden_from=0))
        result, found = await peer.result_and_states()
        assert (result.status, found) == (Status.CONFLICT, [])
    for base, absurd in ((7, 7), (8, 10**6), (9, MOST)):
        await peer.send(peer.job("s", base, [], round_=base, hidden_from=absurd))
        result, found = await peer.result_and_states()
        assert (result.status, found) == (Status.COMMITTED, [])
    await peer.send(peer.job("s", 10, [], round_=20, hidden_from=2))
    _, found = await peer.result_and_states()
    assert np.array_equal(unpack(found[0]), states[2:10])


async def test_a_verifier_that_lost_the_commit_race_sends_no_hidden_states(peer: Peer, text: list[int]) -> None:
    await peer.open("s")
    await peer.send(peer.job("s", 4, text[:1], hidden_from=0))
    await peer.result_and_states()
    # Another verifier commits the next round without this one.
    await peer.store.commit("v2", [Commit("s", 1, 6, 0, text[2:3], None, 6)])
    await peer.send(peer.job("s", 6, text[2:5], round_=2, hidden_from=5))
    result, found = await peer.result_and_states()
    assert (result.status, result.tokens, found) == (Status.CONFLICT, text[2:3], [])


async def test_an_idle_verifier_checks_its_kv_cache_and_drops_a_wrong_one(
    peer: Peer, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "IDLE_S", 0.1)
    checked = asyncio.Event()
    loop = asyncio.get_running_loop()
    whole = Engine.integrity

    def corrupted(engine: Engine) -> None:
        engine._pool._users[engine._pool.table("s")[0]] += 1
        loop.call_soon_threadsafe(checked.set)
        whole(engine)

    before = metrics.INTEGRITY_ERRORS._value.get()
    monkeypatch.setattr(Engine, "integrity", corrupted)
    await peer.open("s")
    (first,) = await peer.verify(peer.job("s", 4, text[:2]))
    await asyncio.wait_for(checked.wait(), HANG_S)
    monkeypatch.setattr(Engine, "integrity", whole)
    (second,) = await peer.verify(peer.job("s", 7, text[3:5], 1))
    assert first.tokens + second.tokens == text[:6]
    assert second.new_tokens == 7 + 2, "the session is prefilled again"
    assert metrics.INTEGRITY_ERRORS._value.get() == before + 1


async def test_a_run_decodes_the_targets_own_text(peer: Peer, text: list[int]) -> None:
    await peer.open("s", max_tokens=21)
    await peer.begin_run("s", 4)
    first, *reports = await peer.rest_of_run()
    assert (first.tokens, first.run) == (text[:1], False)
    assert all(report.run and report.accepted == report.drafted == 0 for report in reports)
    tokens = [token for result in (first, *reports) for token in result.tokens]
    assert tokens == text[:21]
    assert [r.base_len for r in reports] == [
        4 + sum(len(r.tokens) for r in (first, *reports[:i])) for i in range(len(reports))
    ]
    assert [r.round for r in reports] == list(range(1, len(reports) + 1))
    assert reports[-1].finish is Finish.LENGTH
    assert await peer.committed("s") == PROMPT + text[:21]


async def test_a_run_ends_with_its_grant_and_the_next_round_goes_on(peer: Peer, text: list[int]) -> None:
    await peer.open("s")
    await peer.begin_run("s", 4, tokens=5)
    results = await peer.rest_of_run()
    assert sum(len(result.tokens) for result in results) == 6
    (following,) = await peer.verify(peer.job("s", 10, text[6:9], round_=9))
    assert (following.accepted, following.tokens, following.run_left) == (3, text[6:10], 0)


async def test_copies_in_a_run_are_verified_and_reported(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    await peer.open("plain", max_tokens=150)
    await peer.begin_run("plain", 4, tokens=149)
    plain = [token for result in await peer.rest_of_run() for token in result.tokens]
    assert len(plain) == 150

    def often_right(text: LookupText, length: int, drafted: Sequence[int] = ()) -> tuple[list[int], int]:
        made = len(text) - len(PROMPT)
        return [plain[at] if at % 7 else plain[at] ^ 1 for at in range(made, min(150, made + length))], 32

    monkeypatch.setattr(LookupText, "continuation", often_right)
    await peer.open("copying", max_tokens=150)
    await peer.begin_run("copying", 4, tokens=149, copies=8)
    results = await peer.rest_of_run()
    copied = [result.base_len - len(PROMPT) + index for result in results for index in result.copied]
    assert await peer.committed("copying") == await peer.committed("plain") == PROMPT + plain
    assert 30 < len(copied) == len({*copied}) < 130
    assert all(at % 7 for at in copied), "a wrong copy is the step's own token"
    assert results[-1].finish is Finish.LENGTH


async def test_the_estimator_learns_from_steps_with_runs(
    amqp_url: str, redis_url: str, namespace: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of their steps reaches it, with the rows of copies, and it predicts such steps better afterwards."""
    monkeypatch.setattr(LookupText, "continuation", lambda *_: ([9, 9, 9], 32))
    slow = (100.0, 0, 0, 0, 0, 10.0, 0)
    async with playing(amqp_url, redis_url, namespace, model, emulated_cost=slow) as peer:
        for session in ("a", "b"):
            await peer.open(session, max_tokens=12)
            await peer.begin_run(session, 4, copies=8)
        rows, ended = 0, 0
        while ended < 2:
            result = await peer.result()
            rows += result.trimmed_to + (result.run_steps if result.run else 1)
            ended += result.finish is not None
        measured: list[Measurement] = []
        while sum(one.shape.rows for one in measured) < rows:
            sample = await asyncio.wait_for(peer.samples.get(), HANG_S)
            assert isinstance(sample, Sample)
            measured += sample.batches
    assert sum(one.shape.rows for one in measured) == rows
    of_runs = [one for one in measured if one.shape.new_tokens == one.shape.rows]
    assert len(of_runs) >= 8, "the other steps have computed a prompt"
    assert any(one.shape.rows > one.shape.jobs for one in of_runs), "copies are rows too"
    fit = VerifierFit("v1")
    before = fit.model()
    for one in measured:
        fit.add(one)
    errors = [
        median(abs(cost.predict_ms(made, one.shape) / one.measured_ms - 1) for one in of_runs)
        for made in (before, fit.model())
    ]
    assert errors[1] < 0.5 * errors[0], "the model before knows another machine"


async def test_a_run_beside_rounds_and_another_run(peer: Peer, text: list[int]) -> None:
    for session in ("run", "other", "rounds"):
        await peer.open(session, max_tokens=25)
    await peer.begin_run("run", 4)
    await peer.begin_run("other", 4)
    found: dict[str, list[int]] = {"run": [], "other": [], "rounds": []}
    await peer.send(peer.job("rounds", 4, text[:2]))
    while min(map(len, found.values())) < 25:
        result = await peer.result()
        found[result.session] += result.tokens
        if result.session == "rounds" and result.finish is None:
            length = len(found["rounds"])
            await peer.send(peer.job("rounds", 4 + length, text[length : length + 2], round_=length))
    assert found == dict.fromkeys(found, text[:25])


async def test_a_run_does_not_wait_for_redis_with_the_batch_of_another_session(
    peer: Peer, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()
    read = Store.read

    async def slow_read(store: Store, sessions: Sequence[str]) -> Any:
        if "new" in sessions:
            asked.set()
            await answered.wait()
        return await read(store, sessions)

    await peer.open("run", max_tokens=900)
    await peer.open("new")
    await peer.open("next")
    await peer.begin_run("run", 4, tokens=880)
    await peer.result()
    monkeypatch.setattr(Store, "read", slow_read)
    await peer.send(peer.job("new", 4, text[:2]))
    await peer.send(peer.job("next", 4, text[:3]))
    await asyncio.wait_for(asked.wait(), HANG_S)
    meanwhile = [await peer.result() for _ in range(5)]
    assert all(result.run for result in meanwhile)
    assert len({result.base_len for result in meanwhile}) == 5
    answered.set()
    found: dict[str, Result] = {}
    while len(found) < 2:
        result = await peer.result()
        if not result.run:
            found[result.session] = result
    assert list(found) == ["new", "next"], "in the order in which they came"
    assert (found["new"].tokens, found["next"].tokens) == (text[:3], text[:4])
    await peer.broker.publish(Halt(sessions=["run"]), topology.batch("v1"))


@pytest.mark.parametrize("error", [BrokersError("away"), RuntimeError("a defect")])
async def test_a_session_that_was_not_read_beside_a_run_is_read_again(
    peer: Peer, text: list[int], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    read, failures = Store.read, [error]
    asked, answered = asyncio.Event(), asyncio.Event()

    async def failing_read(store: Store, sessions: Sequence[str]) -> Any:
        if "new" in sessions and failures:
            asked.set()
            await answered.wait()
            raise failures.pop()
        return await read(store, sessions)

    await peer.open("run", max_tokens=900)
    await peer.open("new")
    await peer.open("next")
    await peer.begin_run("run", 4, tokens=880)
    await peer.result()
    monkeypatch.setattr(Store, "read", failing_read)
    await peer.send(peer.job("new", 4, text[:2]))
    await peer.send(peer.job("next", 4, text[:3]))
    await asyncio.wait_for(asked.wait(), HANG_S)
    answered.set()
    found: dict[str, list[int]] = {}
    while len(found) < 2:
        result = await peer.result()
        if not result.run:
            found[result.session] = result.tokens
    assert found == {"new": text[:3], "next": text[:4]}
    assert not failures
    await peer.broker.publish(Halt(sessions=["run"]), topology.batch("v1"))


async def test_a_fault_while_a_run_is_reported_ends_it_and_loses_no_token(
    peer: Peer, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, failed = Store.commit, asyncio.Event()

    async def failing_commit(store: Store, verifier: str, commits: Sequence[Commit], **given: Any) -> Any:
        if commits[0].session_id == "s" and commits[0].base_len > 4 and not failed.is_set():
            failed.set()
            raise RuntimeError("a defect")
        return await commit(store, verifier, commits, **given)

    await peer.open("s")
    monkeypatch.setattr(Store, "commit", failing_commit)
    await peer.begin_run("s", 4, tokens=20)
    (first,) = [await peer.result()]
    await asyncio.wait_for(failed.wait(), HANG_S)
    made = len(first.tokens)
    (following,) = await peer.verify(peer.job("s", 4 + made, text[made : made + 2], round_=9))
    assert (following.accepted, following.tokens, following.run) == (2, text[made : made + 3], False)
    assert await peer.committed("s") == PROMPT + text[: made + 3]


async def test_a_halted_run_ends_within_a_step(peer: Peer, text: list[int]) -> None:
    await peer.open("s", max_tokens=900)
    await peer.begin_run("s", 4, tokens=880)
    await peer.result()
    await peer.broker.publish(Halt(sessions=["s", "unknown"]), topology.batch("v1"))
    results = await peer.rest_of_run()
    assert results[-1].finish is None, "long before the end of its grant"
    assert results[-1].base_len + len(results[-1].tokens) == len(await peer.committed("s"))


async def test_the_run_of_a_cancelled_session_ends(peer: Peer) -> None:
    await peer.open("s", max_tokens=900)
    await peer.begin_run("s", 4, tokens=880)
    await peer.result()
    await peer.store.cancel("s")
    await peer.broker.publish(Cancel(session="s", reason="test"), topology.CANCEL)
    lengths = [0]
    async with asyncio.timeout(HANG_S):
        while lengths[-1] != (length := len(await peer.committed("s"))):
            lengths.append(length)
            await asyncio.sleep(0.3)
    assert length < len(PROMPT) + 880, "long before the end of its grant"


async def test_a_run_whose_session_is_cancelled_in_redis_alone_ends(peer: Peer) -> None:
    await peer.open("s", max_tokens=900)
    await peer.begin_run("s", 4, tokens=880)
    await peer.result()
    await peer.store.cancel("s")
    while (result := await peer.result()).error is None:
        pass
    assert result.error.code == "cancelled"


async def test_a_job_in_the_middle_of_a_run_gets_its_tokens(peer: Peer, text: list[int]) -> None:
    await peer.open("s", max_tokens=25)
    await peer.begin_run("s", 4)
    await peer.send(peer.job("s", 4, [], round_=0, run=RunGrant(tokens=64, ms=HANG_S * 1000)))
    tokens: dict[int, int] = {}
    while True:
        result = await peer.result()
        tokens |= dict(enumerate(result.tokens, result.base_len))
        if result.finish is not None:
            break
    assert [tokens[position] for position in sorted(tokens)] == text[:25]
    assert await peer.committed("s") == PROMPT + text[:25]


async def test_a_run_that_another_verifier_overtakes_stops(peer: Peer, text: list[int]) -> None:
    await peer.open("s", max_tokens=900)
    await peer.begin_run("s", 4, tokens=880)
    await peer.result()
    while True:
        length = len(await peer.committed("s"))
        commit = Commit("s", 99, length, 0, (1,), None, length)
        if (await peer.store.commit("v2", [commit]))[0].outcome is CommitOutcome.COMMITTED:
            break
    while (result := await peer.result()).status is Status.COMMITTED:
        pass
    assert (result.status, result.run_left, result.tokens[0]) == (Status.CONFLICT, 0, 1)
    await asyncio.sleep(0.2)
    assert len(await peer.committed("s")) == length + 1


async def test_a_run_reports_nothing_after_its_lease(peer: Peer) -> None:
    await peer.open("s", max_tokens=900)
    await peer.begin_run("s", 4, tokens=880)
    await peer.result()
    # As after a pause of the process: the lease has expired, somebody else has the session, a new lease is taken.
    before = peer.leases[-1]
    await peer.store.registry.remove("v1")
    length = len(await peer.committed("s"))
    async with asyncio.timeout(HANG_S):
        while peer.leases[-1] == before:  # noqa: ASYNC110 - heartbeats are a list
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    assert len(await peer.committed("s")) == length


async def test_without_a_lease_no_run_starts(peer: Peer, text: list[int]) -> None:
    await peer.open("s")
    (result,) = await peer.verify(peer.job("s", 4, [], run=RunGrant(tokens=9, ms=1000.0)))
    assert (result.tokens, result.run_left) == (text[:1], 0)


async def ended_spans(recorded: Recorded, count: int, *names: str) -> list[ReadableSpan]:
    """Wait for this many ended spans of these names: they end after the results are sent."""
    async with asyncio.timeout(HANG_S):
        while len(found := recorded.named(*names)) < count:  # noqa: ASYNC110 - an exporter has no event
            await asyncio.sleep(0.01)
    return found


async def test_a_batch_has_a_span_for_each_traced_job(peer: Peer, text: list[int]) -> None:
    for session in ("a", "b", "untraced"):
        await peer.open(session)
    with recording() as recorded:
        rounds = {session: tracing.begin("round", {}) for session in ("a", "b")}
        jobs = [peer.job(session, 4, text[:2]) for session in ("a", "untraced", "b")]
        await peer.send(*jobs, trace=tracing.headers_of(rounds))
        for _ in jobs:
            assert (await peer.result()).status is Status.COMMITTED
        made = await ended_spans(recorded, 2, "prefill")
        by_session = {span.attributes["wisp.session"]: span for span in made if span.attributes}
        assert set(by_session) == {"a", "b"}
        for session, span in by_session.items():
            assert span.attributes is not None
            assert span.parent is not None
            assert f"{span.parent.span_id:016x}" == rounds[session].ids["span_id"]
            assert span.attributes["wisp.batch.jobs"] == 3
            assert span.attributes["wisp.accepted"] == 2
            assert span.attributes["wisp.tokens"] == 3
            assert span.attributes["wisp.prefilled"] == len(PROMPT) - 1
            assert [event.name for event in span.events] == ["model started", "model done", "committed"]
        first, second = by_session["a"], by_session["b"]
        assert [f"{link.context.span_id:016x}" for link in first.links] == [rounds["b"].ids["span_id"]]
        assert [link.context for link in second.links] == [first.context]
        # The next round of a session without its context, as after an update: verified all the same, without a span.
        (result,) = await peer.verify(peer.job("a", 7, text[3:5], 1))
        assert result.status is Status.COMMITTED
        assert len(recorded.named("prefill", "verify")) == 2


async def test_a_dropped_batch_ends_its_spans(peer: Peer, text: list[int]) -> None:
    await peer.open("s")
    with recording() as recorded:
        batch = builders.batch("fenced", peer.job("s", 4, text[:2]), lease=peer.leases[-1] + 1)
        trace = tracing.headers_of({"s": tracing.begin("round", {})})
        await peer.broker.publish(batch, topology.batch("v1"), confirmed=True, trace=trace)
        (span,) = await ended_spans(recorded, 1, "verify")
        assert span.attributes is not None
        assert span.attributes["error.type"] == "dropped"


async def test_a_traced_run_has_a_span_for_each_report(peer: Peer) -> None:
    await peer.open("s", max_tokens=400)
    with recording() as recorded:
        round_span = tracing.begin("round", {})
        await peer.begin_run("s", 4, tokens=300, trace=tracing.headers_of({"s": round_span}))
        await peer.result()
        reports = await peer.rest_of_run()
        spans = await ended_spans(recorded, len(reports), "run steps")
        counted = [span.attributes["wisp.tokens"] for span in spans if span.attributes]
        assert counted == [len(report.tokens) for report in reports]
        for before, span in zip([None, *spans], spans, strict=False):
            assert span.parent is not None
            assert f"{span.parent.span_id:016x}" == round_span.ids["span_id"]
            assert before is None or span.start_time == before.end_time, "steps begin after the last report"
