"""From text to prompt tokens, without ever tokenizing much more than fits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.gateway.errors import invalid
from services.gateway.request import Limits, too_long
from shared.models.errors import ChatTemplateError
from shared.models.text import Tokenizer

INLINE_CHARACTERS = 20_000
"""Longer prompts are tokenized in a thread; one of this length takes about 10 ms."""
SLICE_CHARACTERS = 16_000


async def chat_prompt(
    tokenizer: Tokenizer, limits: Limits, messages: Sequence[Mapping[str, Any]], texts: Sequence[str]
) -> list[int]:
    """Token ids of a conversation; `texts` is all that its messages say. Raises ApiError."""
    try:
        return await _tokenize(tokenizer, limits, texts, lambda: tokenizer.render_chat(messages), "messages")
    except ChatTemplateError as error:
        raise invalid(str(error), "messages") from error


async def text_prompt(tokenizer: Tokenizer, limits: Limits, text: str, bos_id: int | None, param: str) -> list[int]:
    """Token ids of a raw prompt; an empty one begins with the model's beginning-of-text token. Raises ApiError."""
    ids = await _tokenize(tokenizer, limits, [text], lambda: tokenizer.encode(text), param)
    return ids or ([] if bos_id is None else [bos_id])


async def _tokenize(
    tokenizer: Tokenizer, limits: Limits, texts: Sequence[str], tokenize: Callable[[], list[int]], param: str
) -> list[int]:
    """What `tokenize` makes of these texts. Long ones are measured first, and tokenized beside the event loop."""
    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        return tokenize()

    def measured() -> list[int]:
        # Tokenizing takes some 200 bytes of memory per token: a body of 4 MB took 490 MB.
        most = 2 * min(limits.context, limits.prompt or limits.context)
        if _has_more_tokens(tokenizer, texts, most):
            raise too_long(limits, f"has more than {most}", param)
        return tokenize()

    return await asyncio.to_thread(measured)


def _has_more_tokens(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> bool:
    """Whether the texts have more tokens than the limit, counted slice by slice: a few more than there are."""
    count = 0
    for text in texts:
        for start in range(0, len(text), SLICE_CHARACTERS):
            count += len(tokenizer.encode(text[start : start + SLICE_CHARACTERS]))
            if count > limit:
                return True
    return False
