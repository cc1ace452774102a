"""Starting a session: its state in Redis, then the Generate that a drafter takes up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from services.gateway.errors import unavailable
from services.gateway.request import Plan
from shared.broker import topology
from shared.broker.session_keys import SessionKeys
from shared.broker.topology import Queue
from shared.errors import BrokersError, Unroutable
from shared.messages import Generate, Message
from shared.state.store import Progress, Request, Session


class Publisher(Protocol):
    """What is needed of `shared.broker.client.Broker`."""

    async def publish(self, message: Message, key: str, *, cc: tuple[str, ...] = (), persistent: bool = False) -> None:
        """See there."""

    async def bind(self, queue: Queue, key: str) -> None:
        """See there."""

    async def unbind(self, queue: Queue, key: str) -> None:
        """See there."""


class SessionStore(Protocol):
    """What is needed of `shared.state.store.Store`."""

    async def create(
        self,
        request: Request,
        prompt: Sequence[int],
        elapsed_ms: float = 0.0,
        *,
        patience_ms: int = 0,
        kept: bytes = b"",
    ) -> None:
        """See there."""

    async def progress(self, session: str, from_len: int) -> Progress | None:
        """See there."""

    async def cancel(self, session: str, gateway: str = "") -> bool:
        """See there."""

    async def leave(self, session: str, gateway: str, length: int) -> None:
        """See there."""

    async def kept(self, session: str) -> bytes | None:
        """See there."""

    async def collect(self, session: str, gateway: str) -> bool:
        """See there."""

    async def read(self, sessions: Sequence[str]) -> list[Session | None]:
        """See there."""


@dataclass(frozen=True)
class Starter:
    """Starts the sessions of this gateway."""

    publisher: Publisher
    store: SessionStore
    instance: str
    fingerprint: str
    vocab_fingerprint: str
    patience_ms: int
    """How long a session goes on while no gateway collects it."""
    session_keys: SessionKeys = field(default_factory=lambda: SessionKeys(None))

    async def start(self, plan: Plan, started_s: float) -> None:
        """Hand a session to the drafters of its pool. `started_s` is when its request came in.

        Raises ApiError with status 503 when no drafter takes it, or RabbitMQ or Redis are away.
        """
        record = Request(
            session=plan.session,
            gateway=self.instance,
            prompt_len=len(plan.prompt),
            sampling=plan.sampling,
            stop_ids=plan.stop_ids,
            max_tokens=plan.max_tokens,
            fingerprint=self.fingerprint,
            slo=plan.slo,
        )
        try:
            await self.store.create(
                record,
                plan.prompt,
                (monotonic() - started_s) * 1000,
                patience_ms=self.patience_ms,
                kept=plan.kept,
            )
            generate = Generate(
                session=plan.session,
                gateway=self.instance,
                prompt=plan.prompt,
                sampling=plan.sampling,
                stop_ids=plan.stop_ids,
                max_tokens=plan.max_tokens,
                fingerprint=self.fingerprint,
                vocab_fingerprint=self.vocab_fingerprint,
                slo=plan.slo,
                service_class=plan.service_class,
                draft=plan.draft,
                elapsed_ms=(monotonic() - started_s) * 1000,
            )
            generate = self.session_keys.add_to(generate)
            await self.publisher.publish(generate, topology.generate(plan.pool), persistent=True)
        except Unroutable as error:
            if plan.pool.startswith(topology.device_name("")):
                text = f"{plan.pool!r} has no queue: import the definitions that its name is in"
                raise unavailable(text, "no_drafter") from error
            where = "" if plan.pool == topology.DEFAULT_POOL else f" in pool {plan.pool!r}"
            raise unavailable(f"no drafter is running{where}; try again when one has started", "no_drafter") from error
        except BrokersError as error:
            raise unavailable(str(error), "brokers_unavailable", retry_after_s=2) from error
