"""Prompts: from text to token ids within the limits. Text that is far too long is refused before it is tokenized."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from services.gateway.core.reasoning import CLOSE, OPEN, TAGS
from services.gateway.errors import ApiError, invalid
from services.gateway.object_options import PredictionOption
from services.gateway.schema import ChatRequest, CompletionRequest
from services.gateway.tools import conversation
from shared.errors import ChatTemplateError, quoted
from shared.models.text import Detokenizer, Tokenizer

INLINE_CHARACTERS = 20_000
"""Longer prompts are tokenized in a thread; one of this length takes about 10 ms."""
SLICE_CHARACTERS = 16_000
TAG_TOKENS = 64
"""Tokens at the end of a prompt in which an opened tag of reasoning is looked for."""


@dataclass(frozen=True)
class Limits:
    """Limits of the model, the verifiers and the settings, in tokens."""

    context: int
    """Longest session: the model's context, or the largest verifier's cache if that is smaller."""
    vocab_size: int
    prompt: int | None = None
    """Longest prompt, where the settings limit it."""
    output: int | None = None
    """Most output tokens of a completion, where the settings limit them."""


@dataclass(frozen=True)
class Prompt:
    """One checked prompt of a request."""

    tokens: list[int]
    echo: str = ""
    """Text to send before the generated text."""
    thinks: bool | None = None
    """True if the prompt ends within the model's reasoning, False if not; None if the model marks no reasoning."""


async def chat_prompts(tokenizer: Tokenizer, limits: Limits, request: ChatRequest) -> list[Prompt]:
    """Return the one prompt of a conversation. Raises ApiError."""
    tokens = await chat_tokens(tokenizer, limits, request)
    check_prompt(tokens, limits, "messages")
    return [Prompt(tokens, thinks=_is_thinking(tokenizer, tokens) if tokenizer.thinks else None)]


async def chat_tokens(tokenizer: Tokenizer, limits: Limits, request: ChatRequest) -> list[int]:
    """Return the tokens of a conversation. Raises ApiError."""
    for name in request.template_variables:
        if name not in tokenizer.template_variables:
            param = "chat_template_kwargs" if name in request.chat_template_kwargs else name
            known = ", ".join(sorted(tokenizer.template_variables)) or "none of its own"
            text = f"{param}: the model's chat template has no variable {quoted(name)}; it has {known}"
            raise invalid(text, param, "unsupported_parameter")
    try:
        return await _tokenize(tokenizer, limits, _texts(request), partial(render, tokenizer, request), "messages")
    except ChatTemplateError as error:
        raise invalid(str(error), "messages") from error


async def prompt_tokens(tokenizer: Tokenizer, limits: Limits, text: str, *, special: bool = True) -> list[int]:
    """Return the tokens of a text. special: with the control tokens around every text. Raises ApiError."""
    encode = tokenizer.encode if special else tokenizer.encode_part
    return await _tokenize(tokenizer, limits, [text], partial(encode, text), "prompt")


def render(tokenizer: Tokenizer, request: ChatRequest) -> list[int]:
    """Return the ids of a conversation as the request's options ask for. Raises ChatTemplateError."""
    messages = [message.rendered() for message in request.messages]
    tools: list[dict[str, Any]] = []
    if request.uses_tools:
        messages, tools = conversation(request, tokenizer)
    return tokenizer.render_chat(
        messages,
        request.add_generation_prompt is not False,
        tools,
        continues=request.continue_final_message,
        variables=request.template_variables,
    )


def _texts(request: ChatRequest) -> list[str]:
    """Return the texts of a chat that become tokens, for a first estimate of their number."""
    texts = [text for message in request.messages for text in message.texts()]
    tools = [tool.rendered() for tool in request.offered_tools]
    return [*texts, json.dumps(tools, ensure_ascii=False)] if tools else texts


def _is_thinking(tokenizer: Tokenizer, tokens: Sequence[int]) -> bool:
    """Return whether a prompt ends within the reasoning: the template has opened it."""
    end = Detokenizer(tokenizer, shown=TAGS).feed(tokens[-TAG_TOKENS:])
    return end.rfind(OPEN) > end.rfind(CLOSE)


async def completion_prompts(
    tokenizer: Tokenizer, limits: Limits, request: CompletionRequest, bos_id: int | None
) -> list[Prompt]:
    """Return the prompts of a completion request, given as text or as token ids. Raises ApiError.

    An empty text becomes the model's beginning-of-text token `bos_id`.
    """
    prompts = []
    for number, given in enumerate(request.prompt):
        param = "prompt" if len(request.prompt) == 1 else f"prompt[{number}]"
        if isinstance(given, list):
            tokens = given
        else:
            tokens = await _tokenize(tokenizer, limits, [given], partial(tokenizer.encode, given), param)
            tokens = tokens or ([] if bos_id is None else [bos_id])
        check_prompt(tokens, limits, param)
        echo = "" if not request.echo else given if isinstance(given, str) else tokenizer.decode(given)
        prompts.append(Prompt(tokens, echo))
    return prompts


async def predicted_tokens(tokenizer: Tokenizer, limits: Limits, prediction: PredictionOption) -> list[int]:
    """Return the tokens of the output that a request expects. Raises ApiError."""
    if not (text := prediction.text):
        return []
    tokens = await _tokenize(tokenizer, limits, [text], partial(tokenizer.encode_part, text), "prediction")
    if len(tokens) > limits.context:
        raise _too_long(limits, f"{len(tokens)} tokens", "prediction")
    return tokens


def check_prompt(tokens: Sequence[int], limits: Limits, param: str) -> None:
    """Raise ApiError for a prompt that is empty, leaves no room for a token or has ids outside the vocabulary."""
    if not tokens:
        raise invalid("the prompt has no tokens; send some text", param)
    if limits.prompt is not None and len(tokens) > limits.prompt:
        raise _too_long(limits, f"{len(tokens)} tokens", param)
    if len(tokens) >= limits.context:
        raise _too_long(limits, f"{len(tokens)} tokens, which leaves no room for an answer", param)
    if strays := [token for token in tokens if not 0 <= token < limits.vocab_size]:
        raise invalid(f"token id {strays[0]} is outside the vocabulary of {limits.vocab_size} tokens", param)


async def _tokenize(
    tokenizer: Tokenizer, limits: Limits, texts: Sequence[str], tokenize: Callable[[], list[int]], param: str
) -> list[int]:
    """Call `tokenize`, which tokenizes these texts. Long texts are measured first, both in a thread."""
    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        return tokenize()

    def measured() -> list[int]:
        # Tokenizing takes about 200 bytes of memory per token: a body of 4 MB took 490 MB.
        most = 2 * min(limits.context, limits.prompt or limits.context)
        if _has_more_tokens(tokenizer, texts, most):
            raise _too_long(limits, f"more than {most} tokens", param)
        return tokenize()

    return await asyncio.to_thread(measured)


def _has_more_tokens(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> bool:
    """Return whether the texts have more tokens than the limit. Counts in slices, which overcounts slightly."""
    count = 0
    for text in texts:
        for start in range(0, len(text), SLICE_CHARACTERS):
            count += len(tokenizer.encode(text[start : start + SLICE_CHARACTERS]))
            if count > limit:
                return True
    return False


def _too_long(limits: Limits, count: str, param: str) -> ApiError:
    """Return the error of a too long prompt, in OpenAI's words: clients know it by them."""
    context = f"This model's maximum context length is {limits.context} tokens"
    if limits.prompt is not None and limits.prompt < limits.context:
        context += f", and prompts here may have {limits.prompt} of them"
    text = f"{context}. However, your {param} resulted in {count}. Please reduce the length of the {param}."
    return invalid(text, param, "context_length_exceeded")
