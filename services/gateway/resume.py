"""Resuming a broken stream, at this gateway or another.

The resume record of a streamed answer lies in Redis beside its first session. The text is made again from the committed
tokens, and the part that the client already has is left out.
"""

from __future__ import annotations

from time import monotonic

from services.gateway.answer import Answer, AnswerForm
from services.gateway.core.cursor import StreamCursor
from services.gateway.errors import stream_gone, unavailable
from services.gateway.gateway import Gateway
from services.gateway.keys import ApiKey
from services.gateway.response import AnswerResponse
from shared.errors import BrokersError

LAST_EVENT_ID = "last-event-id"


async def resume(gateway: Gateway, cursor: StreamCursor, key: ApiKey | None) -> AnswerResponse:
    """Return the rest of an answer after `cursor`.

    `key` must be the key of the original request; it is charged for the tokens from now on. Raises ApiError: 404 when
    there is no such stream, 503 when Redis is away. The response itself raises ApiError when the sessions are gone,
    RabbitMQ or Redis are away or this gateway shuts down.
    """
    started_s = monotonic()
    try:
        stored = await gateway.transport.resume_record(cursor.answer_id)
    except BrokersError as error:
        raise unavailable(str(error), "brokers_unavailable", retry_after_s=2) from error
    if stored is None:
        raise stream_gone()
    try:
        form = AnswerForm.unpack(stored)
    except ValueError as error:
        raise stream_gone(str(error)) from error
    if form.holder != (None if key is None else key.id):
        raise stream_gone()
    answer = Answer(cursor.answer_id, form, started_s, key=key, resumed=True)
    answer.cursor = cursor
    return AnswerResponse(gateway.sessions, gateway.ledger, answer)
