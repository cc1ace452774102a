"""Centralized serving in virtual time: continuous batching, alone or with drafts on the server's own accelerator."""

from __future__ import annotations

from collections.abc import Sequence

import simpy

from services.baseline.core.batching import Batcher, SequenceState, StepPart
from services.tools.simulator.core.drafts import DraftTokens
from services.tools.simulator.core.scenario import Scenario
from services.tools.simulator.core.world import (
    RIGHT,
    WRONG,
    ClientRequest,
    Process,
    SimulatedHardware,
    World,
    finish_of,
)
from services.verifier.core.acceptance import accept
from shared import cost
from shared.messages import Measurement, Result, Status

BLOCK = 16
"""Tokens in a block of KV: vLLM's default."""
MOST_RUNNING = 256
DRAFT_LENGTH = 4
"""Draft tokens of each session in each step of the colocated arm."""


class SimulatedCache:
    """The engine's KV cache as continuous batching sees it, in blocks."""

    def __init__(self, tokens: int) -> None:
        self._blocks = tokens // BLOCK
        self._cached: dict[str, int] = {}

    @property
    def free_tokens(self) -> int:
        """Tokens that fit without evicting a session."""
        return (self._blocks - sum(-(-tokens // BLOCK) for tokens in self._cached.values())) * BLOCK

    def cached(self, session_id: str) -> int:
        """Return the number of a session's tokens in the cache."""
        return self._cached.get(session_id, 0)

    def attach(self, session_id: str, tokens: Sequence[int]) -> int:
        """Attach a session; return the number of its tokens in the cache. No two texts share a prefix."""
        return self._cached.setdefault(session_id, 0)

    def release(self, session_id: str) -> None:
        """Release a session."""
        self._cached.pop(session_id, None)

    def keep(self, session_id: str, tokens: int) -> None:
        """Hold a session's first tokens."""
        self._cached[session_id] = tokens


class _CentralServer:
    """One accelerator with its sessions."""

    def __init__(self, world: CentralWorld, speed: float) -> None:
        self.sessions: dict[str, tuple[ClientRequest, DraftTokens, SequenceState]] = {}
        self.speed = speed
        self.cache = SimulatedCache(world.target.kv_tokens)
        self.batcher = Batcher(
            self.cache,
            block_tokens=BLOCK,
            prefill_tokens=world.scenario.prefill_tokens,
            max_running=MOST_RUNNING,
            draft_length=world.draft_length,
        )
        self.wake: simpy.Event = world.env.event()


class CentralWorld(World):
    """Each accelerator serves its share of the requests by continuous batching; a new one goes to the emptiest."""

    def __init__(self, scenario: Scenario, hardware: SimulatedHardware, seed: int, *, drafts: bool) -> None:
        super().__init__(scenario, hardware, seed)
        self.draft_length = DRAFT_LENGTH if drafts else 0
        self._servers = [_CentralServer(self, scenario.speed_of(number)) for number in range(scenario.verifiers)]
        for server in self._servers:
            self.env.process(self._loop(server))

    def serve(self, served: ClientRequest) -> None:
        if served.gone:
            return
        server = min(self._servers, key=lambda one: len(one.sessions) / one.speed)
        generate = served.generate
        drafts = self.drafts.of_request(served.request.seed)
        limit = len(generate.prompt) + generate.max_tokens
        sequence = SequenceState(generate.session, list(generate.prompt), limit)
        server.sessions[generate.session] = served, drafts, sequence
        server.batcher.add(sequence)
        if not server.wake.triggered:
            server.wake.succeed()

    def give_up(self, served: ClientRequest) -> None:
        for server in self._servers:
            if (found := server.sessions.pop(served.generate.session, None)) is not None:
                server.batcher.remove(found[2])

    def _loop(self, server: _CentralServer) -> Process:
        while True:
            parts = server.batcher.next_step()
            if not parts:
                server.wake = self.env.event()
                yield server.wake
                continue
            jobs = []
            for part in parts:
                length = part.prefill_to or len(part.sequence.tokens) + part.draft
                rows = 0 if part.prefill_to is not None else part.draft + 1
                jobs.append((part.tokens + part.draft, length, rows))
            shape = cost.shape_of(jobs)
            took_ms = self.target.time_ms(shape) / server.speed
            drafted = max((part.draft for part in parts), default=0)
            yield self.env.timeout(took_ms + drafted * self.scenario.server_draft_ms)
            self.batches.append(Measurement(shape=shape, measured_ms=took_ms))
            for part in parts:
                self._settle(server, part)

    def _settle(self, server: _CentralServer, part: StepPart) -> None:
        """Give a session the tokens of a step."""
        sequence = part.sequence
        if sequence.session_id not in server.sessions:
            return
        if part.prefill_to is not None:
            server.cache.keep(sequence.session_id, part.prefill_to)
            return
        served, drafts, _ = server.sessions[sequence.session_id]
        base_len = len(sequence.tokens)
        position = base_len - len(served.generate.prompt)
        draft = [RIGHT if drafts.token(position, i).right else WRONG for i in range(part.draft)]
        verdict = accept(draft, [RIGHT] * (len(draft) + 1), sequence.limit - base_len, frozenset())
        server.cache.keep(sequence.session_id, base_len + verdict.accepted)
        sequence.tokens += verdict.tokens
        finish = finish_of(served.generate, len(sequence.tokens))
        self.deliver(
            served,
            Result(
                session=sequence.session_id,
                round=0,
                base_len=base_len,
                status=Status.COMMITTED,
                verifier="server",
                batch="step",
                tokens=verdict.tokens,
                finish=finish,
            ),
        )
        if finish is not None:
            server.batcher.remove(sequence)
            del server.sessions[sequence.session_id]
