"""From a request to the sessions that answer it: token ids, limits and seeds of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from services.gateway.errors import ApiError, invalid
from services.gateway.schema import GenerationRequest
from shared.messages import DraftChoice, Sampling, Slo


@dataclass(frozen=True)
class Plan:
    """One session to be started."""

    session: str
    prompt: list[int]
    sampling: Sampling
    stop_ids: list[int]
    max_tokens: int
    stops: list[str]
    slo: Slo | None
    service_class: str
    pool: str
    draft: DraftChoice
    echo: str = ""
    """Text that is returned before the generated text."""
    streamed: bool = False
    """Whether the client may go on with its stream after it broke."""
    keep: bool = False
    """Whether the session goes on for a while when its client goes away, so that it may come back."""
    kept: bytes = b""
    """What it takes to go on with the answer elsewhere (`resume.Kept`), with its first session."""


@dataclass(frozen=True)
class Limits:
    """What the model and the verifiers allow, in tokens."""

    context: int
    """Longest session: the model's context, or the largest verifier's cache where that is smaller."""
    vocab_size: int
    prompt: int | None = None
    """Longest prompt, where whoever runs the gateway allows less than fits."""
    output: int | None = None
    """Most output tokens of a text, likewise."""


def plan(
    request: GenerationRequest,
    name: str,
    prompts: Sequence[list[int]],
    seed: int,
    limits: Limits,
    *,
    limit: int | None,
    stop_ids: Sequence[int],
    slo: Slo | None,
    service_class: str,
    pool: str,
    draft: DraftChoice,
    echoes: Sequence[str],
) -> list[Plan]:
    """One session for each prompt and each of its `n` texts, in the order of their indices in the response.

    `limit` is the asked number of output tokens, None for all that the limits leave; it is cut to what the context
    leaves. The prompts have passed `check_prompt`. Raises ApiError when more is asked for than is allowed.
    """
    if limits.output is not None and limit is not None and limit > limits.output:
        text = f"max_tokens is too large: {limit}; this gateway gives at most {limits.output} output tokens for a text"
        raise invalid(text, "max_tokens")
    plans: list[Plan] = []
    for prompt, echo in zip(prompts, echoes, strict=True):
        room = min(limits.context - len(prompt), limits.output or limits.context)
        for copy in range(request.n):
            index = len(plans)
            plans.append(
                Plan(
                    session=session_name(name, index),
                    prompt=prompt,
                    sampling=request.sampling(derive_seed(seed, copy)),
                    stop_ids=[] if request.ignore_eos else list(stop_ids),
                    max_tokens=room if limit is None else min(limit, room),
                    stops=request.stop,
                    slo=slo,
                    service_class=service_class,
                    pool=pool,
                    draft=draft,
                    echo=echo,
                )
            )
    return plans


def session_name(answer: str, index: int) -> str:
    """Name of the session of an answer's text."""
    return f"{answer}.{index}" if index else answer


def derive_seed(seed: int, copy: int) -> int:
    """The seed of a request's copy number `copy`: the seed itself for the first, so that n=1 is its prefix."""
    if copy == 0:
        return seed
    digest = blake2b(f"{seed}:{copy}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def check_prompt(prompt: list[int], limits: Limits, param: str) -> None:
    """Refuse a prompt that leaves no room for a single token or holds ids that are no tokens. Raises ApiError."""
    if not prompt:
        raise invalid("the prompt has no tokens; send some text", param)
    if limits.prompt is not None and len(prompt) > limits.prompt:
        raise too_long(limits, f"has {len(prompt)} of them", param)
    if len(prompt) >= limits.context:
        raise too_long(limits, f"has {len(prompt)} of them, which leaves no room for an answer", param)
    if strays := [token for token in prompt if not 0 <= token < limits.vocab_size]:
        raise invalid(f"token id {strays[0]} is outside the vocabulary of {limits.vocab_size} tokens", param)


def too_long(limits: Limits, problem: str, param: str) -> ApiError:
    """The refusal of a prompt that does not fit."""
    most = min(limits.context, limits.prompt or limits.context)
    text = f"at most {most} tokens fit here, and the prompt {problem}; shorten it"
    return invalid(text, param, "context_length_exceeded")
