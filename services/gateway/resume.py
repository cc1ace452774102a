"""Going on with a stream that broke, at this gateway or another: what it takes is in Redis.

Beside each streamed answer's first session lies a `Kept` record: how the answer is written. Its text is made again from
the committed tokens, and what the client has of it is left out.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

import msgpack
from pydantic import ValidationError

from services.gateway.core.cursor import Place
from services.gateway.core.keys import ApiKey
from services.gateway.errors import ApiError, unavailable
from services.gateway.request import Plan, session_name
from services.gateway.response import Answer, Order
from services.gateway.stream import Reply
from shared.errors import BrokersError
from shared.messages import DraftChoice, Record
from shared.state.store import Session

if TYPE_CHECKING:
    from services.gateway.app import Gateway

LAST_EVENT_ID = "last-event-id"
GONE = (
    "there is no such stream to go on with: it is unknown, ended long ago, was not streamed, or its state was lost; "
    "send the request again"
)


class Kept(Record):
    """How a streamed answer is written, and which sessions it has."""

    created: int
    model: str
    chat: bool
    include_usage: bool
    service_tier: str | None
    service_class: str
    trace: bool
    keep: bool
    pool: str
    seed: int
    stops: list[str]
    echoes: list[str]
    """One for each session."""
    prompt_tokens: int
    holder: str | None = None
    """The API key that it was asked for with; nobody else gets it."""

    def pack(self) -> bytes:
        """As it is stored."""
        return msgpack.packb(self.model_dump())  # type: ignore[no-any-return]


async def resume(gateway: Gateway, place: Place, holder: ApiKey | None) -> Answer:
    """The rest of the answer that the client has up to `place`, for the holder of the key that asked for it, which is
    charged for the tokens that come from now on.

    Raises ApiError: 404 when its state is gone, 503 when Redis or RabbitMQ are away or this gateway shuts down.
    """
    started_s = monotonic()
    try:
        stored = await gateway.backend.kept(place.name)
        kept = None if stored is None else Kept.model_validate(msgpack.unpackb(stored))
        names = [session_name(place.name, index) for index in range(len(kept.echoes) if kept else 0)]
        mine = kept is not None and kept.holder == holder_of(holder)
        sessions = await gateway.backend.collect(names if mine else [])
    except BrokersError as error:
        raise unavailable(str(error), "brokers_unavailable", retry_after_s=2) from error
    except (ValueError, ValidationError) as error:
        raise ApiError(404, f"{GONE} ({error})", code="stream_gone") from error
    if kept is None or None in sessions or kept.holder != holder_of(holder):
        raise ApiError(404, GONE, code="stream_gone")
    found = [session for session in sessions if session is not None]
    if any(session.request.fingerprint != gateway.fingerprint for session in found):
        raise unavailable("this gateway serves another model than the one that this stream is of", "wrong_model")
    plans = [_plan(session, kept, echo) for session, echo in zip(found, kept.echoes, strict=True)]
    reply = Reply(
        id=place.name,
        created=kept.created,
        model=kept.model,
        fingerprint=f"fp_{gateway.fingerprint[:16]}",
        chat=kept.chat,
        include_usage=kept.include_usage,
        service_tier=kept.service_tier,
    )
    order = Order(
        plans,
        prompt_tokens=kept.prompt_tokens,
        stream=True,
        trace=kept.trace,
        started_s=started_s,
        headers={"x-wisp-seed": str(kept.seed)},
        key=holder,
        place=place,
        states=found,
    )
    return Answer(gateway.backend, gateway.ledger, reply, order)


def holder_of(key: ApiKey | None) -> str | None:
    """Whose an answer is."""
    return None if key is None else key.id


def _plan(session: Session, kept: Kept, echo: str) -> Plan:
    request = session.request
    return Plan(
        session=request.session,
        prompt=session.tokens[: request.prompt_len],
        sampling=request.sampling,
        stop_ids=request.stop_ids,
        max_tokens=request.max_tokens,
        stops=kept.stops,
        slo=request.slo,
        service_class=kept.service_class,
        pool=kept.pool,
        draft=DraftChoice.AUTO,
        echo=echo,
        streamed=True,
        keep=kept.keep,
    )
