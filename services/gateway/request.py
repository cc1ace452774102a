"""From a request to its answer: the parts that its options need, the sessions, and the form to send."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from secrets import randbits, token_hex
from time import time

from fastapi import Request

from services.drafter.sources.registry import AUTO
from services.gateway.answer import Answer, AnswerForm, session_id
from services.gateway.core.admission import ServiceClass
from services.gateway.errors import ApiError, invalid
from services.gateway.gateway import Gateway
from services.gateway.grammar import grammar_of, grammar_of_calls
from services.gateway.keys import ApiKey, key_of
from services.gateway.prompt import Limits, Prompt, chat_prompts, completion_prompts, predicted_tokens
from services.gateway.rules import check_token_ids, find_blank_ids, rules_of
from services.gateway.schema import ChatRequest, CompletionRequest, GenerationRequest, HeaderOptions
from services.gateway.tools import ToolForm, tool_form
from shared.broker.topology import DEFAULT_POOL, device_name
from shared.errors import quoted
from shared.messages import DEFAULT_CLASS, Generate, Grammar, Slo, needing
from shared.runtime import tracing


async def accept(gateway: Gateway, http: Request, request: GenerationRequest, started_s: float) -> Answer:
    """Return the answer to the request that came with `http`. Raises ApiError.

    What only some requests need (a prediction, a grammar, rules, tools) is called for those only, here and in
    `new_answer`.
    """
    model, key = gateway.model, None if gateway.keys is None else key_of(http.scope)
    if isinstance(request, CompletionRequest):
        check_choices(gateway, request.n * len(request.prompt))
    limits = await _limits(gateway, request)
    if isinstance(request, CompletionRequest):
        prompts = await completion_prompts(model.tokenizer, limits, request, model.folder.bos_id)
    else:
        assert isinstance(request, ChatRequest)
        prompts = await chat_prompts(model.tokenizer, limits, request)
    predicted: Sequence[int] = ()
    if request.prediction is not None:
        predicted = await predicted_tokens(model.tokenizer, limits, request.prediction)
    grammar = await grammar_of(request, model) if request.has_grammar else None
    if request.reasoning_budget is not None:
        await asyncio.to_thread(find_blank_ids, model)
    return new_answer(gateway, request, http.headers, prompts, limits, key, started_s, predicted, grammar)


async def _limits(gateway: Gateway, request: GenerationRequest) -> Limits:
    settings, folder = gateway.settings, gateway.model.folder
    context = min(folder.max_len, await gateway.upstream.longest_session(request.needs))
    return Limits(context, folder.vocab_size, settings.max_prompt_tokens, settings.max_output_tokens)


def new_answer(
    gateway: Gateway,
    request: GenerationRequest,
    headers: Mapping[str, str],
    prompts: Sequence[Prompt],
    limits: Limits,
    key: ApiKey | None,
    started_s: float,
    predicted: Sequence[int] = (),
    grammar: str | None = None,
) -> Answer:
    """Return the answer to a request, with one session for each prompt and each of its `n` completions.

    The prompts have passed `check_prompt`; `predicted` are the tokens of the request's `prediction`, and `grammar` is
    the one of its answers. Raises ApiError when the request exceeds a limit.
    """
    check_choices(gateway, request.n * len(prompts))
    if request.has_rules or request.stop_token_ids:
        check_token_ids(request, limits.vocab_size)
    limit = output_limit(request, limits)
    options = HeaderOptions(headers)
    form = _form(gateway, request, options, prompts, key, predicted)
    answer_id = f"{'chatcmpl' if form.chat else 'cmpl'}-{token_hex(12)}"
    event_ids = form.keep or takes_event_ids(headers)
    answer = Answer(answer_id, form, started_s, request.stream, event_ids, key)
    slo = slo_of(options, request.service_tier, gateway.settings.slo_classes)
    rules = rules_of(request, gateway.model, form.thinks) if request.has_rules else None
    ends = [] if request.ignore_eos else gateway.model.folder.eos_ids
    stop_ids = list(dict.fromkeys([*ends, *request.stop_token_ids]))
    for prompt in prompts:
        room = min(limits.context - len(prompt.tokens), limits.output or limits.context)
        if request.min_tokens > (most := room if limit is None else min(limit, room)):
            raise invalid(f"min_tokens is {request.min_tokens}, and at most {most} tokens fit", "min_tokens")
        logprobs = request.logprobs_of(len(prompt.tokens))
        own_rules = None if rules is None else rules.model_copy(update={"prompt_len": len(prompt.tokens)})
        own_grammar = None if grammar is None else Grammar(text=grammar, prompt_len=len(prompt.tokens))
        for copy in range(request.n):
            sampling = request.sampling(derive_seed(form.seed, copy), gateway.sampling_defaults)
            changes = {"rules": own_rules, "logprobs": logprobs, "grammar": own_grammar}
            generate = Generate(
                session=session_id(answer_id, len(answer.sessions)),
                gateway=gateway.instance,
                prompt=prompt.tokens,
                sampling=sampling.model_copy(update=changes),
                stop_ids=stop_ids,
                max_tokens=max(1, most),
                fingerprint=needing(gateway.model.fingerprint, request.needs),
                vocab_fingerprint=gateway.model.vocab_fingerprint,
                slo=slo,
                service_class=form.service_class,
                draft=draft_of(request, options),
                trace=form.trace,
                prediction=list(predicted),
                grouped=True,
            )
            answer.sessions.append(generate)
    output_tokens = 0 if limit is None else sum(session.max_tokens for session in answer.sessions)
    answer.reserved_tokens = form.prompt_tokens + output_tokens
    return answer


def _form(
    gateway: Gateway,
    request: GenerationRequest,
    headers: HeaderOptions,
    prompts: Sequence[Prompt],
    key: ApiKey | None,
    predicted: Sequence[int],
) -> AnswerForm:
    service_class = class_of(request.service_tier, gateway.settings.slo_classes)
    return AnswerForm(
        created=int(time()),
        model=gateway.model.name,
        chat=isinstance(request, ChatRequest),
        include_usage=request.stream_options.include_usage,
        service_tier=None if request.service_tier is None else service_class,
        service_class=service_class,
        trace=request.wisp.trace,
        keep=request.wisp.resumable and request.stream,
        pool=pool_of(request, headers, key),
        seed=request.seed if request.seed is not None else randbits(63),
        stops=request.stop,
        include_stop=request.include_stop_str_in_output,
        min_tokens=request.min_tokens,
        logprobs=request.top,
        token_ids=request.return_tokens_as_token_ids,
        prompt_logprobs=request.prompt_logprobs,
        echo=request.echoes,
        prompt_only=request.limit == 0,
        thinks=prompts[0].thinks,
        metrics=request.wisp.metrics,
        copies=request.n,
        predicted=None if request.prediction is None else list(predicted),
        echoes=[prompt.echo for prompt in prompts for _ in range(request.n)],
        prompt_tokens=sum(len(prompt.tokens) for prompt in prompts),
        holder=None if key is None else key.id,
        tools=_tools(gateway, request) if isinstance(request, ChatRequest) and request.offered_tools else None,
        traceparent=tracing.current().headers.get(tracing.TRACEPARENT, ""),
    )


def _tools(gateway: Gateway, request: ChatRequest) -> ToolForm:
    return tool_form(request, gateway.model, grammar_of_calls(request, gateway.model))


def check_model(gateway: Gateway, name: str) -> None:
    """Raise ApiError with status 404 unless a request names the served model."""
    if name != gateway.model.name:
        raise ApiError(
            404,
            f"the model {quoted(name)} does not exist; this server has {gateway.model.name!r}",
            code="model_not_found",
            param="model",
        )


def check_choices(gateway: Gateway, count: int) -> None:
    """Raise ApiError when a request asks for too many completions."""
    if count > (most := gateway.settings.max_choices):
        raise invalid(f"prompts times n is {count}; one request may ask for at most {most} completions", "n")


def output_limit(request: GenerationRequest, limits: Limits) -> int | None:
    """Return the requested number of output tokens per completion; None for as many as fit. Raises ApiError."""
    if limits.output is not None and request.limit is not None and request.limit > limits.output:
        text = f"max_tokens is too large: {request.limit}; this gateway allows at most {limits.output} output tokens"
        raise invalid(text, "max_tokens")
    return request.limit


def takes_event_ids(headers: Mapping[str, str]) -> bool:
    """Return whether the client may use the ids of events.

    OpenAI's clients say that they take JSON only. They have no use for the ids, and the one for Python fails on the
    comments that proxies send to keep a stream alive, once an event had an id.
    """
    accepted = [part.partition(";")[0].strip().lower() for part in headers.get("accept", "*/*").split(",")]
    return any(media_type in ("text/event-stream", "text/*", "*/*") for media_type in accepted)


def pool_of(request: GenerationRequest, headers: HeaderOptions, key: ApiKey | None) -> str:
    """Return the pool of drafters: the device that owns the key, else the pool that the request names.

    The option overrides the header. The names of devices' pools have a dot and those of other pools have none, so a
    request cannot name a device. Raises ApiError.
    """
    if key is not None and key.device is not None:
        return device_name(key.device)
    return request.wisp.pool or headers.pool or DEFAULT_POOL


def draft_of(request: GenerationRequest, headers: HeaderOptions) -> str:
    """Return the requested draft source; the option overrides the header. Raises ApiError."""
    return request.wisp.draft or headers.draft or AUTO


def class_of(tier: str | None, classes: Mapping[str, ServiceClass]) -> str:
    """Return the class named by a `service_tier`; the default class for None and for unknown names such as `auto`."""
    return tier if tier is not None and tier in classes else DEFAULT_CLASS


def slo_of(headers: HeaderOptions, tier: str | None, classes: Mapping[str, ServiceClass]) -> Slo | None:
    """Return the SLO that the request asks for; None for best effort.

    A request asks for one by naming a class that has one, or by a header, which overrides the class. With only one of
    the two headers, the class completes the SLO; a class without a promise is completed from the default class. Raises
    ApiError.
    """
    own = classes[tier].slo if tier is not None and tier in classes else None
    ttft_ms, tpot_ms = headers.ttft_ms, headers.tpot_ms
    if ttft_ms is None and tpot_ms is None:
        return own
    base = own or classes[DEFAULT_CLASS].slo
    assert base is not None  # the settings refuse a default class without a promise
    return Slo(
        ttft_ms=base.ttft_ms if ttft_ms is None else ttft_ms, tpot_ms=base.tpot_ms if tpot_ms is None else tpot_ms
    )


def derive_seed(seed: int, copy: int) -> int:
    """Return the seed of a prompt's completion number `copy`.

    The first completion has the request's own seed, so it equals the one of a request with n=1.
    """
    if copy == 0:
        return seed
    digest = blake2b(f"{seed}:{copy}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
