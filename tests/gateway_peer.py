"""The services behind a gateway, for its tests: a tiny tokenizer folder, and a peer that answers by a script.

The peer speaks the real protocol: it takes Generate messages, commits to the store and publishes Results, but knows
the text in advance instead of computing it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import builders
import numpy as np
import tokenizers
from patience import HANG_S
from safetensors.numpy import save_file

from services.gateway.core.reasoning import TAGS
from services.gateway.settings import GatewaySettings
from services.tools.bench.support.tiny import EOS, byte_tokenizer
from shared.arithmetic import distinct
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.messages import Cancel, Ended, Failure, Finish, Generate, Heartbeat, Message, Result, Status
from shared.messages.logprobs import TokenLogprob, as_text, pack_logprobs
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.state.commits import Commit, CommitOutcome
from shared.state.store import Store

CONTEXT = 512


def tiny_target(path: Path) -> ModelFolder:
    """Make a model folder whose tokens are single bytes (id = the byte's position in GPT-2's alphabet + 3)."""
    vocab_size = byte_tokenizer(path)
    config = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    (path / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.zeros(1, np.float32)}, path / "model.safetensors")
    return ModelFolder(path)


def with_tags(folder: ModelFolder, *, special: bool = False) -> ModelFolder:
    """Make the tags of reasoning tokens of a tiny folder's model. special: control tokens."""
    backend = tokenizers.Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(tag, special=special, normalized=False) for tag in TAGS])
    backend.save(str(folder.path / "tokenizer.json"))
    config = json.loads((folder.path / "config.json").read_text())
    size = backend.get_vocab_size(with_added_tokens=True)
    (folder.path / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    return ModelFolder(folder.path)


@dataclass
class Script:
    """The peer's answer."""

    text: str = "Hello there, world."
    round_len: int = 4
    """Committed tokens per round; all but the last are accepted drafts."""
    rejected: int = 1
    """Rejected draft tokens per round."""
    trimmed: int = 1
    """Draft tokens per round that the scheduler trimmed."""
    pause_s: float = 0.0
    ends: bool = True
    """True if the completion ends; otherwise the peer falls silent."""
    arithmetics: Sequence[str] = ()
    """Arithmetic of each round; that of the last one also holds for all later rounds."""
    failure: Failure | None = None
    """Reported before the first token."""
    failure_after: int | None = None
    """Rounds after which the session fails; None if it does not."""
    reorder: Callable[[list[Result]], list[Result]] = list
    """Selects and orders the results that the gateway receives."""


def results_of(generate: Generate, script: Script, tokenizer: Tokenizer) -> list[Result]:
    """Return the results of a session's rounds, in order."""

    def result(number: int, base_len: int, status: Status, **fields: object) -> Result:
        fields = {"status": status, "verifier": "peer", "batch": f"b{number}"} | fields
        return builders.result(generate.session, number, base_len, **fields)

    base_len = len(generate.prompt)
    if script.failure is not None:
        return [result(0, base_len, Status.FAILED, error=script.failure)]
    output = tokenizer.encode(script.text) + ([generate.stop_ids[0]] if script.ends and generate.stop_ids else [])
    finish = Finish.STOP if script.ends and len(output) <= generate.max_tokens else None
    if len(output) >= generate.max_tokens:
        output, finish = output[: generate.max_tokens], finish or Finish.LENGTH
    results = [result(0, base_len, Status.PREFILLED, queue_ms=1.0, verify_ms=2.0)]
    for number, start in enumerate(range(0, len(output), script.round_len)):
        tokens = output[start : start + script.round_len]
        accepted = len(tokens) - 1
        results.append(
            result(
                number,
                base_len + start,
                Status.COMMITTED,
                tokens=tokens,
                accepted=accepted,
                trimmed_to=accepted + script.rejected,
                drafted=accepted + script.rejected + script.trimmed,
                finish=finish if start + script.round_len >= len(output) else None,
                draft_ms=0.25,
                queue_ms=0.5,
                verify_ms=0.75,
                committed_in=distinct(script.arithmetics[: number + 1]),
                **logprobs_of(generate, base_len + start, tokens),
            )
        )
    if script.failure_after is not None:
        failure = Failure(code="verification_failed", message="broken")
        end = result(script.failure_after, base_len, Status.FAILED, error=failure)
        return [*results[: script.failure_after + 1], end]
    return results


def logprobs_of(generate: Generate, base_len: int, tokens: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a result with log-probabilities: a token at position p has -p / 8, and rank p."""
    wanted = generate.sampling.logprobs
    if wanted is None:
        return {}
    begins = wanted.prompt_len == base_len
    text = [*generate.prompt, *tokens] if begins else tokens
    start = 1 if begins else base_len
    records = [
        TokenLogprob(-at / 8, at, tuple((text[at - (0 if begins else base_len)], -at / 8) for _ in range(wanted.top)))
        for at in range(start, base_len + len(tokens))
    ]
    return {"logprobs": as_text(pack_logprobs(records)), "logprobs_from": start}


@dataclass
class Peer:
    """Drafter, scheduler and verifier in one, over RabbitMQ and Redis."""

    broker: Broker
    store: Store
    tokenizer: Tokenizer
    heartbeat: Heartbeat
    fingerprint: str
    script: Script = field(default_factory=Script)
    generated: list[Generate] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    """Sessions with a Cancel message."""
    ended: list[Ended] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Sessions for which Redis accepts no more tokens."""
    held: asyncio.Event | None = None
    """Holds answers back until it is set."""
    beats: bool = True
    """True if it sends heartbeats."""
    leave_pool: Callable[[], Awaitable[None]] | None = None
    """Ends its consuming of new requests."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @classmethod
    @asynccontextmanager
    async def run(cls, amqp_url: str, redis_url: str, namespace: str, target: ModelFolder) -> AsyncIterator[Peer]:
        """Run a peer with its consumers and a heartbeat."""
        names = Topology(namespace)
        broker = await Broker.connect(amqp_url, names, "peer")
        store = Store.connect(redis_url, namespace, 60)
        room = {"max_len": CONTEXT, "free_tokens": CONTEXT, "total_tokens": CONTEXT}
        beat = builders.heartbeat("peer", fingerprint=target.fingerprint("bfloat16"), **room)
        peer = cls(broker, store, Tokenizer(target), beat, beat.fingerprint)
        peer.leave_pool = await broker.consume(names.generate_queue(), peer._generate, prefetch=64)
        await broker.consume(names.own_queue("peer", "peer", (topology.CANCEL, topology.ENDED)), peer._receive)
        beating = asyncio.create_task(peer._beat())
        await store.registry.beat(beat)
        try:
            yield peer
        finally:
            for task in (beating, *peer._tasks):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await broker.close()
            await store.close()

    async def reset(self) -> None:
        """Clear all records and serve the right model again."""
        self.script = Script()
        self.generated.clear()
        self.cancelled.clear()
        self.ended.clear()
        self.refused.clear()
        self.heartbeat = self.heartbeat.model_copy(update={"fingerprint": self.fingerprint})
        await self.store.registry.beat(self.heartbeat)

    async def _beat(self) -> None:
        while True:
            if self.beats:
                await self.store.registry.beat(self.heartbeat)
            await asyncio.sleep(0.5)

    async def _receive(self, message: Message) -> None:
        if isinstance(message, Ended):
            self.ended.append(message)
        else:
            assert isinstance(message, Cancel)
            self.cancelled.append(message.session)

    async def _generate(self, message: Message) -> None:
        assert isinstance(message, Generate)
        self.generated.append(message)
        task = asyncio.create_task(self._answer(message, self.script))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, generate: Generate, script: Script) -> None:
        if self.held is not None:
            await self.held.wait()
        results = results_of(generate, script, self.tokenizer)
        reported = script.reorder(results) if script.pause_s == 0 else []
        for result in results:
            if script.pause_s:
                await asyncio.sleep(script.pause_s)
            if result.status is Status.COMMITTED and not await self._commit(result):
                self.refused.append(generate.session)
                return
            if script.pause_s:
                await self.publish(generate.gateway, result)
        for result in reported:
            await self.publish(generate.gateway, result)

    async def publish(self, gateway: str, result: Result) -> None:
        """Send a result to its gateway."""
        await self.broker.publish(result, topology.result(gateway))

    async def _commit(self, result: Result) -> bool:
        commit = Commit(
            session_id=result.session,
            round=result.round,
            base_len=result.base_len,
            accepted=result.accepted,
            tokens=result.tokens,
            finish=result.finish,
            cached=0,
        )
        (committed,) = await self.store.commit("peer", [commit])
        return committed.outcome is CommitOutcome.COMMITTED


def settings(target: Path, **fields: object) -> GatewaySettings:
    """Return settings that ignore the environment and the command line."""
    return GatewaySettings.model_validate({"target": target, "instance": "gateway-test", "port": 0} | fields)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; fail only after `HANG_S`."""
    async with asyncio.timeout(HANG_S):
        while not condition():  # noqa: ASYNC110 conditions are plain attributes of a test's records
            await asyncio.sleep(0.01)


async def eventually_answers(ask: Callable[[], Awaitable[bool]]) -> None:
    """Ask until the answer is yes; fail only after `HANG_S`."""
    async with asyncio.timeout(HANG_S):
        while not await ask():  # noqa: ASYNC110 the answer comes from another process
            await asyncio.sleep(0.1)
