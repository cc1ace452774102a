"""The rules of a request's sessions: its options on logits, checked against the model's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.core.reasoning import CLOSE, OPEN, TAGS
from services.gateway.errors import invalid
from services.gateway.model import ServedModel
from services.gateway.schema import GenerationRequest
from shared.messages import LogitRules, ReasoningBudget, TokenBias


def check_token_ids(request: GenerationRequest, vocab_size: int) -> None:
    """Raise ApiError for token ids outside the vocabulary, and for an empty list of allowed ones."""
    if request.allowed_token_ids == []:
        text = "allowed_token_ids is empty, so no token is allowed; leave it out to allow all"
        raise invalid(text, "allowed_token_ids")
    named: list[tuple[str, Sequence[int]]] = [
        ("stop_token_ids", request.stop_token_ids),
        ("logit_bias", list(request.logit_bias)),
        ("allowed_token_ids", request.allowed_token_ids or []),
    ]
    for name, tokens in named:
        if strays := [token for token in tokens if not 0 <= token < vocab_size]:
            raise invalid(f"{name}: token id {strays[0]} is outside the vocabulary of {vocab_size} tokens", name)


def rules_of(request: GenerationRequest, model: ServedModel, thinks: bool | None) -> LogitRules:
    """Return the rules of a request's sessions, without their prompts' length.

    thinks: see `Prompt.thinks`. Raises ApiError for a budget of reasoning that the model does not mark by tokens.
    """
    return LogitRules(
        prompt_len=0,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=[TokenBias(token=token, bias=bias) for token, bias in request.logit_bias.items()],
        min_p=request.min_p,
        min_tokens=request.min_tokens,
        withheld_ids=sorted({*model.folder.eos_ids, *request.stop_token_ids}) if request.min_tokens else [],
        bad_words=[tokens for word in dict.fromkeys(request.bad_words) for tokens in model.tokenizer.spellings(word)],
        allowed_token_ids=None if request.allowed_token_ids is None else sorted({*request.allowed_token_ids}),
        reasoning=None if request.reasoning_budget is None else _budget(request.reasoning_budget, model, thinks),
    )


def find_blank_ids(model: ServedModel) -> None:
    """Let the tokenizer find its blank tokens, once: `rules_of` needs them for a budget of reasoning.

    It reads all tokens of the vocabulary, which takes a second or more. Call it in a thread.
    """
    if all(model.tokenizer.added_token(tag) is not None for tag in TAGS):
        _ = model.tokenizer.blank_ids


def _budget(most: int, model: ServedModel, thinks: bool | None) -> ReasoningBudget:
    opening, closing = (model.tokenizer.added_token(tag) for tag in (OPEN, CLOSE))
    if thinks is None:
        reason = "the model marks no reasoning in its answers"
    elif closing is None or (opening is None and not thinks):
        # A tag of several tokens may come in others, such as one for its last character and the line's end behind it.
        reason = f"{OPEN} and {CLOSE} are no tokens of the model's own, so its reasoning can't be counted by tokens"
    elif thinks:
        return ReasoningBudget(most=most, opening=None, closing=closing)
    else:
        return ReasoningBudget(most=most, opening=opening, blank=model.tokenizer.blank_ids, closing=closing)
    text = f"thinking_token_budget is not supported here: {reason}; leave it out"
    raise invalid(text, "thinking_token_budget", "unsupported_parameter")
