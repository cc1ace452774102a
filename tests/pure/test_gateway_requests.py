"""Requests: bodies, headers and limits. Answers: chunks, traces, SLOs. The fleet: the verifiers behind them."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast

import builders
import msgpack
import pytest
import structlog
from gateway_peer import eventually
from hypothesis import example, given
from hypothesis import strategies as st
from pages import ROOT
from pydantic import ValidationError

from services.drafter.sources.registry import CHOICES
from services.gateway import metrics, stream
from services.gateway.answer import AnswerForm, Usage
from services.gateway.body import Body, parse
from services.gateway.core.completion import CompletionRound, CompletionTally, Piece, Token
from services.gateway.core.reasoning import SplitText
from services.gateway.errors import ApiError, from_failure
from services.gateway.fleet import Fleet, longest_session
from services.gateway.gateway import Gateway
from services.gateway.messages_body import MessagesRequest
from services.gateway.prompt import Limits, Prompt, check_prompt
from services.gateway.request import class_of, derive_seed, new_answer, slo_of
from services.gateway.responses_body import ResponsesRequest
from services.gateway.schema import NO_DEFAULTS, ChatRequest, CompletionRequest, HeaderOptions
from services.gateway.settings import GatewaySettings
from services.gateway.stream import Choice, Chunks
from shared.errors import BrokersError
from shared.messages import RULES, Failure, Generate, Heartbeat, Logprobs, Slo, features_of, model_of
from shared.models.generation import SamplingDefaults
from shared.slo import SloOutcome, judge

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hi"}
PAGE = ROOT / "services/gateway/README.md"
CLASSES = GatewaySettings.model_validate({}).slo_classes


def chat(**options: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps(CHAT | options).encode())


def completion(**options: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps(COMPLETION | options).encode())


def refusal(kind: type[Body], body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, body)
    assert caught.value.status == 400
    return caught.value


def test_openai_defaults_hold_where_an_option_is_missing_or_null() -> None:
    for options in ({}, {"temperature": None, "top_p": None, "n": None, "stop": None, "stream": None, "wisp": None}):
        request = chat(**options)
        sampling = request.sampling(0)
        assert (sampling.temperature, sampling.top_p, sampling.top_k, request.n, request.stop) == (1.0, 1.0, 0, 1, [])
        assert (request.stream, request.limit, request.seed) == (False, None, None)
    assert completion().limit == 16


def test_unknown_options_are_ignored() -> None:
    chat(user="u", metadata={"a": 1}, store=True, parallel_tool_calls=True, no_such_option=[[]])
    assert chat(stream_options={"include_usage": True, "continuous_usage_stats": True}).stream_options.include_usage


def test_the_newer_of_two_token_limits_counts() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).limit == 7
    assert chat(max_tokens=5).limit == 5
    assert chat(max_tokens=5, max_completion_tokens=None).limit == 5


def test_a_single_stop_string_needs_no_list() -> None:
    assert chat(stop="x").stop == ["x"]
    assert chat(stop=["x", "yy"]).stop == ["x", "yy"]


def test_content_may_be_parts_and_developer_means_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts, "name": "x"}])
    assert request.messages[0].rendered() == {"role": "system", "content": parts}


@pytest.mark.parametrize(
    ("given_prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]]), ("", [""])],
)
def test_prompts_may_be_text_or_tokens_one_or_many(given_prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=given_prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [1, True], [1.5], {}, 7, None, [["a"]], [[1], []], [None]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert refusal(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode()).param == "prompt"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**40}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": -1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": -2}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": "x" * 5000}, "stop"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "x"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": ["a"] * 1025}, "bad_words"),
        ({"allowed_token_ids": "5"}, "allowed_token_ids"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prediction": "text"}, "prediction"),
        ({"prediction": {"type": "other", "content": "x"}}, "prediction.type"),
        ({"prediction": {"type": "content"}}, "prediction.content"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"wisp": {"metrics": 1}}, "wisp.metrics"),
        ({"wisp": {"tracer": True}}, "wisp.tracer"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"service_tier": 5}, "service_tier"),
        ({"wisp": {"draft": "psychic"}}, "wisp.draft"),
        ({"wisp": {"pool": "a.b"}}, "wisp.pool"),
        ({"wisp": {"pool": ""}}, "wisp.pool"),
        ({"wisp": {"pool": "x" * 65}}, "wisp.pool"),
        ({"wisp": {"pool": "phones\n"}}, "wisp.pool"),
        ({"wisp": 1}, "wisp"),
    ],
)
def test_wrong_values_are_refused_by_name(options: dict[str, Any], param: str) -> None:
    error = refusal(ChatRequest, json.dumps(CHAT | options).encode())
    assert error.param == param
    assert param in error.message


UNSUPPORTED: list[dict[str, Any]] = [
    {"functions": [{"name": "f"}]},
    {"function_call": {"name": "f"}},
    {"verbosity": "low"},
    # vLLM
    {"enable_thinking": False},
    {"documents": [{"title": "a", "text": "b"}]},
    {"spaces_between_special_tokens": False},
    {"truncate_prompt_tokens": 100},
    # SGLang
    {"ebnf": "root ::= x"},
    {"regex": "[ab]+"},
    {"stop_regex": ["a+"]},
    # llama.cpp and Ollama
    {"dry_multiplier": 0.8},
    {"format": "json"},
    {"grammar": "root ::= x"},
    {"json_schema": {}},
    {"mirostat": 2},
    {"n_predict": 5},
    {"options": {"temperature": 0}},
    {"repeat_penalty": 1.1},
    {"samplers": ["top_k"]},
    {"think": False},
    {"typical_p": 0.9},
    {"xtc_probability": 0.5},
    # text-generation-inference and transformers
    {"do_sample": False},
    {"max_new_tokens": 5},
    {"no_repeat_ngram_size": 2},
    {"parameters": {"max_new_tokens": 5}},
    # a mistake of those who use no OpenAI client
    {"extra_body": {"wisp": {"trace": True}}},
]


@pytest.mark.parametrize("options", UNSUPPORTED, ids=lambda options: next(iter(options)))
def test_unsupported_options_are_refused(options: dict[str, Any]) -> None:
    for kind, fields in ((ChatRequest, CHAT), (CompletionRequest, COMPLETION)):
        error = refusal(kind, json.dumps(fields | options).encode())
        assert error.code == "unsupported_parameter"
        assert error.param in options
        assert str(error.param) in error.message


def test_unsupported_fields_of_messages_are_refused() -> None:
    for field in ({"function_call": {"name": "f"}}, {"prefix": True}):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", **field}]
        error = refusal(ChatRequest, json.dumps(CHAT | {"messages": messages}).encode())
        assert (error.code, error.param) == ("unsupported_parameter", f"messages[1].{next(iter(field))}")
    messages = [{"role": "assistant", "content": "", "tool_calls": [], "prefix": False, "refusal": None}]
    assert chat(messages=messages).messages[0].role == "assistant"


@given(st.permutations(UNSUPPORTED))
def test_the_first_unsupported_option_of_the_body_is_named(order: list[dict[str, Any]]) -> None:
    options = {name: value for one in order[:5] for name, value in one.items()}
    assert refusal(ChatRequest, json.dumps(CHAT | options).encode()).param == next(iter(options))


@pytest.mark.parametrize(
    ("kind", "options", "advice"),
    [
        (CompletionRequest, {"top_logprobs": 5}, "(in a text completion the number is `logprobs`)"),
        (ChatRequest, {"n_probs": 5}, "(log-probabilities are `logprobs`)"),
        (ChatRequest, {"grammar": "root ::= x"}, "the option is `guided_grammar`"),
        (ChatRequest, {"repeat_penalty": 1.1}, "send null or 1 (the penalty is `repetition_penalty`)"),
        (ChatRequest, {"structural_tag": {}}, "leave it out or send null"),
        (ChatRequest, {"n_predict": 5}, "`max_tokens`"),
    ],
)
def test_a_refusal_names_the_expected_input(kind: Any, options: dict[str, Any], advice: str) -> None:
    fields = CHAT if kind is ChatRequest else COMPLETION
    assert advice in refusal(kind, json.dumps(fields | options).encode()).message


@pytest.mark.parametrize(
    "options",
    [
        {"tools": None},
        {"tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"logprobs": False, "top_logprobs": None, "prompt_logprobs": None},
        {"logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0, "best_of": None},
        {"repeat_penalty": 1.0, "min_p": 0, "mirostat": 0, "typical_p": 1, "dry_multiplier": 0, "samplers": []},
        {"n_predict": -1, "chat_template_kwargs": {}, "bad_words": [], "grammar": "", "extra_body": {}},
    ],
)
def test_unsupported_options_may_have_the_neutral_value(options: dict[str, Any]) -> None:
    assert chat(**options) == chat()


def test_whole_numbers_may_have_a_fraction_of_zero() -> None:
    assert [request.limit for request in (chat(max_tokens=4.0), completion(max_tokens=4.0))] == [4, 4]
    assert chat(max_completion_tokens=4.0).limit == 4
    request = chat(n=2.0, top_k=5.0, seed=7.0)
    assert (request.n, request.top_k, request.seed) == (2, 5, 7)
    assert completion(prompt=[1.0, 2]).prompt == [[1, 2]]
    assert completion(prompt=[[1.0], [2]]).prompt == [[1], [2]]


def test_a_token_limit_of_minus_one_is_none() -> None:
    for value in (-1, -1.0):
        assert chat(max_tokens=value).limit is None
        assert chat(max_completion_tokens=value).limit is None
        assert completion(max_tokens=value).limit is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b"{}garbage",
        b'{"model": NaN}',
        b'{"model": Infinity}',
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"model": "\\ud800"}',
        b'{"model": "\xed\xa0\x80"}',
        b'{"seed": ' + b"9" * 10_000 + b"}",
        "{'model': 'm'}".encode("utf-16"),
    ],
)
def test_bodies_other_than_json_objects_are_refused(body: bytes) -> None:
    assert refusal(ChatRequest, body).code == "invalid_json"


def test_numbers_too_large_for_a_float_are_refused() -> None:
    body = json.dumps(CHAT).encode()[:-1] + b', "temperature": 1e999}'
    assert refusal(ChatRequest, body).param == "temperature"
    schema = b'{"type": "object", "properties": {"a": {"enum": ["x", 1, [-1e999]]}}}'
    tool = b'{"type": "function", "name": "f", "parameters": ' + schema + b"}"
    assert refusal(ResponsesRequest, b'{"model": "m", "input": "x", "tools": [' + tool + b"]}").code == "invalid_json"
    assert (
        refusal(
            MessagesRequest,
            b"""{"model": "m", "max_tokens": 1, "messages": [{"role": "assistant", "content":
        [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1e400}}]}]}""",
        ).code
        == "invalid_json"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    name=st.sampled_from(sorted(ChatRequest.model_fields | CompletionRequest.model_fields)),
    value=JSON,
    kind=st.sampled_from([ChatRequest, CompletionRequest]),
)
@example(name="seed", value=-(2**63), kind=ChatRequest)
def test_any_value_of_any_option_is_accepted_or_refused(name: str, value: Any, kind: Any) -> None:
    body = json.dumps({**CHAT, **COMPLETION, name: value}).encode()
    refused: ApiError | None = None
    try:
        parse(kind, body).sampling(0)
    except ApiError as error:
        refused = error
    assert refused is None or refused.status == 400
    json.dumps(refused and refused.body(), allow_nan=False).encode()


@given(st.binary(max_size=60))
def test_any_bytes_are_refused(body: bytes) -> None:
    refusal(ChatRequest, body)


def test_tiny_temperatures_are_greedy_and_top_p_zero_keeps_one_token() -> None:
    sampling = chat(temperature=1e-30, top_p=0, top_k=-1).sampling(3)
    assert sampling.temperature == 0
    assert 0 < sampling.top_p < 1e-5
    assert (sampling.top_k, sampling.seed) == (0, 3)


def test_the_models_own_sampling_is_the_default_of_requests() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20)
    for options in ({}, {"temperature": None, "top_p": None, "top_k": None}):
        sampling = chat(**options).sampling(3, defaults)
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 20)
    sampling = chat(temperature=0, top_p=1, top_k=0).sampling(3, defaults)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 1, 0)
    sampling = chat(top_k=5).sampling(3, SamplingDefaults(temperature=0.0))
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 1, 5)


def sessions(
    request: ChatRequest | CompletionRequest, prompts: list[list[int]], headers: dict[str, str] | None = None
) -> list[Generate]:
    """Return the sessions of a request with the seed 11, in a context of 20 tokens."""
    model = SimpleNamespace(
        name="m",
        folder=SimpleNamespace(eos_ids=[2]),
        tokenizer=SimpleNamespace(spellings=lambda word: [[1, 2], [3, 2]]),
        fingerprint="f",
        vocab_fingerprint="v",
    )
    gateway = SimpleNamespace(
        settings=GatewaySettings.model_validate({}), model=model, instance="g", sampling_defaults=NO_DEFAULTS
    )
    request = request.model_copy(update={"seed": 11})
    limits = Limits(20, 100)
    given = [Prompt(prompt) for prompt in prompts]
    return new_answer(cast(Gateway, gateway), request, headers or {}, given, limits, None, 0.0).sessions


def test_every_completion_is_a_session_with_a_seed_of_its_own() -> None:
    made = sessions(completion(n=2), [[5], [6]])
    answer_id = made[0].session
    assert [p.session for p in made[1:]] == [f"{answer_id}.{index}" for index in (1, 2, 3)]
    assert [p.prompt for p in made] == [[5], [5], [6], [6]]
    assert all(p.grouped for p in made)
    first, second = derive_seed(11, 0), derive_seed(11, 1)
    assert first == 11
    assert first != second
    assert [p.sampling.seed for p in made] == [first, second, first, second]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 127))
def test_every_derived_seed_is_valid(seed: int, copy: int) -> None:
    assert -(2**63) <= derive_seed(seed, copy) < 2**63


def test_the_context_limits_the_output() -> None:
    assert sessions(chat(), [[5] * 8])[0].max_tokens == 12
    assert sessions(chat(max_tokens=3), [[5] * 8])[0].max_tokens == 3
    assert sessions(chat(max_tokens=10**30), [[5] * 8])[0].max_tokens == 12


def test_the_draft_source_comes_from_the_option_then_from_the_header() -> None:
    header = {"x-wisp-draft": "lookup"}
    assert sessions(chat(), [[5]])[0].draft == "auto"
    assert sessions(chat(), [[5]], header)[0].draft == "lookup"
    assert sessions(chat(wisp={"draft": "none"}), [[5]], header)[0].draft == "none"


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    limits = Limits(20, 100)
    with pytest.raises(ApiError, match=r"20 tokens.*resulted in 25") as caught:
        check_prompt([5] * 25, limits, "prompt")
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    with pytest.raises(ApiError):
        check_prompt([5] * 20, limits, "prompt")
    check_prompt([5] * 19, limits, "prompt")
    assert sessions(chat(), [[5] * 19])[0].max_tokens == 1


@pytest.mark.parametrize("token", [-1, 100, 10**30])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ApiError, match="outside the vocabulary"):
        check_prompt([5, token], Limits(20, 100), "prompt")


def test_end_of_text_can_be_ignored() -> None:
    assert sessions(chat(), [[5]])[0].stop_ids == [2]
    assert sessions(chat(ignore_eos=True), [[5]])[0].stop_ids == []


def test_stop_token_ids_come_after_those_of_the_model() -> None:
    assert sessions(chat(stop_token_ids=[7, 2, 7.0]), [[5]])[0].stop_ids == [2, 7]
    assert sessions(chat(stop_token_ids=[7], ignore_eos=True), [[5]])[0].stop_ids == [7]


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"presence_penalty": -1}, {"presence_penalty": -1.0}),
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"logit_bias": {"5": -100, "9": 2}}, {"logit_bias": [{"token": 5, "bias": -100}, {"token": 9, "bias": 2}]}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"min_tokens": 3, "stop_token_ids": [7] * 9}, {"min_tokens": 3, "withheld_ids": [2, 7]}),
        ({"min_tokens": 3, "ignore_eos": True}, {"min_tokens": 3, "withheld_ids": [2]}),
        ({"allowed_token_ids": [28, 3, 28]}, {"allowed_token_ids": [3, 28]}),
        ({"bad_words": ["ab", "ab"]}, {"bad_words": [[1, 2], [3, 2]]}),
    ],
)
def test_options_on_logits_are_rules_of_the_session(options: dict[str, Any], fields: dict[str, Any]) -> None:
    (made,) = sessions(chat(**options), [[5, 6]])
    rules = made.sampling.rules
    assert rules is not None
    assert rules.model_dump(exclude_defaults=True) == {"prompt_len": 2, **fields}


def test_sessions_with_rules_have_a_fingerprint_of_their_own() -> None:
    assert [s.fingerprint for s in sessions(chat(), [[5]])] == ["f"]
    (made,) = sessions(chat(min_p=0.1), [[5]])
    assert made.fingerprint == "f+rules"
    assert (model_of(made.fingerprint), features_of(made.fingerprint)) == ("f", {RULES})
    neutral = chat(presence_penalty=0, min_tokens=0, bad_words=[], logit_bias={}, repetition_penalty=1)
    assert sessions(neutral, [[5]])[0].sampling.rules is None


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [100]}, "allowed_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"100": 1}}, "logit_bias"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
        ({"min_tokens": 20}, "min_tokens"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(options: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        sessions(chat(**options), [[5]])
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        (chat(), None),
        (chat(logprobs=False, top_logprobs=0), None),
        (chat(logprobs=True), Logprobs(top=0)),
        (chat(logprobs=True, top_logprobs=3), Logprobs(top=3)),
        (chat(prompt_logprobs=2), Logprobs(top=2, prompt_len=2)),
        (completion(logprobs=False, echo=True), None),
        (completion(logprobs=0), Logprobs(top=0)),
        (completion(logprobs=5, prompt_logprobs=7), Logprobs(top=7, prompt_len=2)),
        (completion(logprobs=1, echo=True, max_tokens=0), Logprobs(top=1, prompt_len=2)),
    ],
)
def test_log_probabilities_are_asked_for_by_the_session(
    request_: ChatRequest | CompletionRequest, wanted: Logprobs | None
) -> None:
    (made,) = sessions(request_, [[5, 6]])
    assert made.sampling.logprobs == wanted
    assert made.fingerprint == ("f" if wanted is None else "f+logprobs")
    assert made.max_tokens >= 1


@pytest.mark.parametrize("options", [{"logprobs": -1}, {"logprobs": 21}, {"logprobs": True}, {"logprobs": "1"}])
def test_text_completions_take_a_number_of_log_probabilities(options: dict[str, Any]) -> None:
    assert refusal(CompletionRequest, json.dumps(COMPLETION | options).encode()).param == "logprobs"


def test_a_prediction_is_text_or_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for content in ("ab", parts):
        request = chat(prediction={"type": "content", "content": content})
        assert request.prediction is not None
        assert request.prediction.text == "ab"


def test_sixteen_stops_are_accepted() -> None:
    assert len(chat(stop=[f"{i}" for i in range(16)]).stop) == 16


def test_forms_that_earlier_gateways_cannot_send_are_unreadable_for_them() -> None:
    plain: dict[str, Any] = {"created": 1, "model": "m", "chat": True, "service_class": "default", "pool": "pool"}
    plain |= {"seed": 1, "stops": [], "echoes": [""], "prompt_tokens": 3}
    form = AnswerForm.model_validate(plain)
    assert AnswerForm.unpack(form.pack()) == form
    assert "created" in msgpack.unpackb(form.pack())
    for field in ({"include_stop": True}, {"logprobs": 0}):
        newer = AnswerForm.model_validate(plain | field)
        assert AnswerForm.unpack(newer.pack()) == newer
        assert "created" not in msgpack.unpackb(newer.pack())


def test_headers_override_the_slo_of_the_class() -> None:
    default, priority = CLASSES["default"].slo, CLASSES["priority"].slo
    assert slo_of(HeaderOptions({}), "default", CLASSES) == default
    assert slo_of(HeaderOptions({}), "priority", CLASSES) == priority
    assert slo_of(HeaderOptions({}), "flex", CLASSES) is None
    both = {"x-llm-d-slo-ttft-ms": "300", "x-slo-tpot-ms": "40.5"}
    assert slo_of(HeaderOptions(both), "flex", CLASSES) == Slo(ttft_ms=300, tpot_ms=40.5)
    assert default is not None
    assert priority is not None
    assert slo_of(HeaderOptions({"x-slo-ttft-ms": "1"}), None, CLASSES) == Slo(ttft_ms=1, tpot_ms=default.tpot_ms)
    assert slo_of(HeaderOptions({"x-slo-tpot-ms": "1"}), "priority", CLASSES) == Slo(
        ttft_ms=priority.ttft_ms, tpot_ms=1
    )
    assert slo_of(HeaderOptions({"x-slo-tpot-ms": "1"}), "flex", CLASSES) == Slo(ttft_ms=default.ttft_ms, tpot_ms=1)


@pytest.mark.parametrize("tier", [None, "auto", "gold", "flex"])
def test_a_request_that_asks_for_no_promise_gets_best_effort(tier: str | None) -> None:
    assert slo_of(HeaderOptions({}), tier, CLASSES) is None


@pytest.mark.parametrize("text", ["", "fast", "0", "-5", "nan", "inf", "1e999", "1_0", "5;6", "٣ms"])
def test_slo_headers_must_be_positive_numbers(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        slo_of(HeaderOptions({"x-slo-ttft-ms": text}), None, CLASSES)
    assert (caught.value.status, caught.value.param) == (400, "x-slo-ttft-ms")


def test_unknown_tiers_mean_the_default_class() -> None:
    for tier, name in ((None, "default"), ("auto", "default"), ("gold", "default"), ("flex", "flex")):
        assert class_of(tier, CLASSES) == name


def test_the_page_names_every_draft_source() -> None:
    ((names, _),) = re.findall(r"\| the draft source of this request: ((`.*?`|[^|])*) \|", PAGE.read_text("utf-8"))
    assert sorted(re.findall(r"`(\w+)`", names)) == sorted(CHOICES)


PROMISE = {"ttft_ms": 100, "tpot_ms": 10}


def test_settings_define_classes_with_slo_and_admission_limit() -> None:
    given_classes = {
        "default": PROMISE,
        "priority": PROMISE,
        "flex": None,
        "batch": {"admit_to": 0.5, "max_sessions": 3},
        "gold": PROMISE | {"admit_to": 1.2},
    }
    classes = GatewaySettings.model_validate({"slo_classes": given_classes}).slo_classes
    assert classes["default"].slo == Slo(ttft_ms=100, tpot_ms=10)
    assert classes["flex"].slo is None
    assert {name: one.admit_to for name, one in classes.items()} == {
        "default": 0.9,
        "priority": 1.0,
        "flex": 0.8,
        "batch": 0.5,
        "gold": 1.2,
    }
    assert (classes["batch"].max_sessions, classes["flex"].max_sessions) == (3, None)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"cors_origins": "chat.example.org"}, "looks like https://chat.example.org"),
        ({"cors_origins": "https://chat.example.org/"}, "looks like https://chat.example.org"),
        ({"cors_origins": "https://a.example https://b.example"}, "looks like https://chat.example.org"),
        ({"allowed_hosts": "http://gateway"}, "looks like wisp.example.org, without a port"),
        ({"allowed_hosts": "gateway:8000"}, "looks like wisp.example.org, without a port"),
        ({"head_timeout_s": 61}, "less than or equal to 60"),
        ({"keep_alive_s": 0}, "greater than or equal to 1"),
    ],
)
def test_invalid_settings_of_connections_and_browsers_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(reason)):
        GatewaySettings.model_validate(fields)


def test_settings_of_connections_and_browsers_have_safe_defaults() -> None:
    settings = GatewaySettings.model_validate({})
    assert (settings.allowed_origins, settings.allowed_host_names) == ([], [])
    assert settings.keep_alive_s == 75
    assert settings.head_timeout_s <= 60


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        ({"default": None}, "default"),
        ({"default": {"admit_to": 1}}, "default"),
        ({"priority": PROMISE}, "default"),
        ({"default": {"ttft_ms": 5}}, "both"),
        ({"default": PROMISE, "a b": None}, "pattern"),
        ({"default": PROMISE, "": None}, "slo_classes"),
        ({"default": PROMISE | {"admit_to": 0}}, "greater"),
        ({"default": PROMISE | {"tpot_ms": 0}}, "greater"),
        ({"default": PROMISE | {"admit": 1}}, "admit"),
        ({"default": 5}, "slo_classes"),
        ([], "slo_classes"),
    ],
)
def test_invalid_classes_are_refused(classes: Any, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        GatewaySettings.model_validate({"slo_classes": classes})


SLO = Slo(ttft_ms=100, tpot_ms=10)


@pytest.mark.parametrize(
    ("slo", "complete", "tokens", "first_ms", "total_ms", "outcome"),
    [
        (SLO, True, 11, 100, 200, SloOutcome(100, 10, True)),
        (SLO, True, 11, 101, 150, SloOutcome(101, 4.9, False)),
        (SLO, True, 11, 50, 151, SloOutcome(50, 10.1, False)),
        (SLO, False, 11, 50, 100, SloOutcome(50, 5, False)),
        (SLO, True, 1, 50, 5000, SloOutcome(50, None, True)),
        (SLO, True, 0, None, 90, SloOutcome(90, None, True)),
        (SLO, True, 0, None, 110, SloOutcome(110, None, False)),
        (SLO, False, 0, None, 90, SloOutcome(None, None, False)),
        (None, True, 3, 5000, 9000, SloOutcome(5000, 2000, True)),
        (None, False, 3, 50, 90, SloOutcome(50, 20, False)),
    ],
)
def test_a_complete_completion_within_both_times_attains_its_slo(
    slo: Slo | None, complete: bool, tokens: int, first_ms: float | None, total_ms: float, outcome: SloOutcome
) -> None:
    assert judge(slo, complete, tokens, first_ms, total_ms) == outcome


def heartbeat(**fields: Any) -> Heartbeat:
    return builders.heartbeat(**({"max_len": 100, "free_tokens": 1, "total_tokens": 1} | fields))


def test_a_session_that_needs_features_gets_a_verifier_with_them() -> None:
    beats = [heartbeat(max_len=300), heartbeat(max_len=200, features=["rules"])]
    assert longest_session(beats, "f", needs=["rules"]) == 200
    with pytest.raises(ApiError, match="the feature rules, which an option of this request needs") as caught:
        longest_session(beats[:1], "f", needs=["rules"])
    assert (caught.value.status, caught.value.code) == (503, "verifiers_too_old")


def test_the_largest_staying_verifier_gives_the_longest_session() -> None:
    beats = [heartbeat(), heartbeat(max_len=300), heartbeat(max_len=900, draining=True)]
    assert longest_session([*beats, heartbeat(max_len=500, fingerprint="other")], "f") == 300


@pytest.mark.parametrize(
    ("beats", "reason"),
    [
        ([], "no verifier is running"),
        ([heartbeat(fingerprint="other")], "another model"),
        ([heartbeat(draining=True)], "shutting down"),
    ],
)
def test_without_a_verifier_of_the_model_there_is_a_503(beats: list[Heartbeat], reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as caught:
        longest_session(beats, "f")
    assert caught.value.status == 503
    assert "retry-after" in caught.value.headers


@pytest.mark.parametrize(("code", "status"), [("context_length_exceeded", 400), ("timeout", 504), ("odd", 500)])
def test_a_sessions_failure_has_its_http_status(code: str, status: int) -> None:
    error = from_failure(Failure(code=code, message="why"))
    assert (error.status, error.body()["error"]["message"]) == (status, "why")


def chunks(**fields: Any) -> Chunks:
    """Return the chunks of an answer with this form."""
    plain = {
        "created": 1,
        "model": "m",
        "service_class": "default",
        "pool": "p",
        "seed": 1,
        "stops": [],
        "echoes": [""],
    }
    return Chunks("id", "f" * 64, AnswerForm.model_validate(plain | {"prompt_tokens": 3} | fields))


def test_chats_and_completions_have_chunks_of_different_shape() -> None:
    chat_chunks, text_chunks = chunks(chat=True), chunks(chat=False)
    opening = chat_chunks.opening(0)
    assert opening is not None
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    delta = chat_chunks.delta(1, SplitText("", "x"))
    assert delta["object"] == "chat.completion.chunk"
    assert delta["choices"] == [{"index": 1, "delta": {"content": "x"}, "logprobs": None, "finish_reason": None}]
    assert chat_chunks.closing(0, "stop")["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert text_chunks.opening(0) is None
    delta = text_chunks.delta(0, SplitText("", "x"))
    assert delta["object"] == "text_completion"
    assert delta["choices"] == [{"index": 0, "text": "x", "logprobs": None, "finish_reason": None}]
    whole = chat_chunks.whole([Choice(SplitText("", "x"), "length")], Usage(3, 4))
    assert whole["object"] == "chat.completion"
    assert whole["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert "reasoning_content" not in whole["choices"][0]["message"]
    assert text_chunks.whole([Choice(SplitText("", "x"), "length")], Usage(3, 4))["choices"][0]["text"] == "x"


def test_reasoning_has_a_field_of_its_own() -> None:
    thinking = chunks(chat=True, thinks=False)
    delta = thinking.delta(0, SplitText("a", "b"))["choices"][0]["delta"]
    assert delta == {"reasoning_content": "a", "content": "b"}
    assert thinking.delta(0, SplitText("a", ""))["choices"][0]["delta"] == {"reasoning_content": "a"}
    message = thinking.whole([Choice(SplitText("", "b"), "stop")], Usage(1, 2))["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("b", None)


def test_speculation_has_vllms_fields() -> None:
    tally = CompletionTally(
        drafts=43, verified=129, accepted=10, accepted_in_round=Counter({0: 39, 1: 1, 3: 3}), longest_draft=3
    )
    assert stream.speculation(tally) == {
        "mean_acceptance_length": pytest.approx(1.2325581395348837),
        "draft_acceptance_rate": pytest.approx(0.07751937984496124),
        "acceptance_histogram": [39, 1, 0, 3],
        "num_spec_steps": 43,
        "num_accepted_draft_tokens": 10,
        "num_draft_tokens": 129,
        "num_spec_tokens": 3,
    }
    none = stream.speculation(CompletionTally(rounds=3, tokens=3))
    assert (none["mean_acceptance_length"], none["acceptance_histogram"]) == (None, [0])


def test_usage_is_null_except_in_the_extra_chunk() -> None:
    with_usage = chunks(chat=True, include_usage=True)
    assert with_usage.delta(0, SplitText("", "x"))["usage"] is None
    assert with_usage.closing(0, "stop")["usage"] is None
    extra = with_usage.usage(Usage(1, 2))
    assert extra["choices"] == []
    assert extra["usage"]["total_tokens"] == 3
    assert "usage" not in chunks(chat=True).delta(0, SplitText("", "x"))


@given(st.text())
def test_an_event_is_one_line_of_json(text: str) -> None:
    sent = stream.event({"text": text})
    assert sent.startswith(b"data: ")
    assert sent.endswith(b"\n\n")
    assert len(sent.decode().splitlines()) == 2
    assert json.loads(sent[6:]) == {"text": text}


def test_the_trace_has_token_origins_and_costs() -> None:
    settled = CompletionRound(
        3, 7, 2, drafted=4, verified=3, accepted=1, draft_ms=0.12345, queue_ms=2.0, verify_ms=30.0
    )
    piece = Piece("ab", [Token(5, "a", True), Token(6, "b", False)], 3, [settled])
    assert stream.trace(piece) == {
        "tokens": [{"id": 5, "text": "a", "draft": True}, {"id": 6, "text": "b", "draft": False}],
        "round": 3,
        "rounds": [
            {
                "round": 3,
                "start": 7,
                "tokens": 2,
                "drafted": 4,
                "verified": 3,
                "accepted": 1,
                "draft_ms": 0.123,
                "queue_ms": 2.0,
                "verify_ms": 30.0,
                "run": False,
                "verifier": "",
                "batch": "",
                "sources": [],
            }
        ],
    }
    tally = CompletionTally(
        rounds=2,
        tokens=5,
        drafted=6,
        verified=4,
        accepted=3,
        run_tokens=2,
        copied=1,
        copies_verified=3,
        draft_ms=1,
        queue_ms=2,
        verify_ms=4,
    )
    outcomes = [SloOutcome(8.0, 0.5, True)]
    slo = Slo(ttft_ms=9, tpot_ms=1)
    assert stream.summary([tally], outcomes, 8.0, 10.0, service_class="priority", slo=slo) == {
        "service_class": "priority",
        "slo": {"ttft_ms": 9, "tpot_ms": 1},
        "attained": True,
        "tpot_ms": 0.5,
        "rounds": 2,
        "tokens": 5,
        "drafted": 6,
        "verified": 4,
        "accepted": 3,
        "run_tokens": 2,
        "copied": 1,
        "copies_verified": 3,
        "ttft_ms": 8.0,
        "total_ms": 10.0,
        "draft_ms": 1,
        "queue_ms": 2,
        "verify_ms": 4,
        "messaging_ms": 3.0,
    }


def test_a_request_attains_its_slo_if_all_its_completions_do() -> None:
    tallies = [CompletionTally(tokens=3), CompletionTally(tokens=1), CompletionTally(tokens=9)]
    outcomes = [SloOutcome(5.0, 2.0, True), SloOutcome(9.0, None, True), SloOutcome(7.0, 4.0, False)]
    made = stream.summary(tallies, outcomes, 5.0, 20.0, service_class="flex", slo=None)
    assert (made["attained"], made["tpot_ms"], made["slo"]) == (False, 4.0, None)
    made = stream.summary(tallies[:2], outcomes[:2], 5.0, 20.0, service_class="flex", slo=None)
    assert (made["attained"], made["tpot_ms"]) == (True, 2.0)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_messaging_time_is_never_negative(work_ms: float, total_ms: float) -> None:
    made = stream.summary([CompletionTally(verify_ms=work_ms)], [], 0, total_ms, service_class="flex", slo=None)
    assert made["messaging_ms"] >= 0
    assert math.isfinite(made["messaging_ms"])


async def test_concurrent_requests_share_one_read_of_the_heartbeats() -> None:
    looks = 0

    async def away() -> list[Heartbeat]:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0.01)
        if looks == 1:
            raise BrokersError("Redis is away")
        return [heartbeat()]

    fleet = Fleet(away, "f")
    failures = await asyncio.gather(*(fleet.longest_session() for _ in range(5)), return_exceptions=True)
    assert [error.status for error in failures if isinstance(error, ApiError)] == [503] * 5
    assert await asyncio.gather(*(fleet.longest_session() for _ in range(5))) == [100] * 5
    assert await fleet.longest_session() == 100
    assert looks == 2


async def test_requests_wait_for_verifiers_that_fall_silent_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.fleet.FRESH_S", 0.0)
    monkeypatch.setattr("services.gateway.fleet.RETRY_S", 0.01)
    answers: list[list[Heartbeat] | Exception] = []

    async def read() -> list[Heartbeat]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    fleet = Fleet(read, "f", wait_s=60)
    answers[:] = [[]]
    with pytest.raises(ApiError, match="no verifier is running; try again"):
        await asyncio.wait_for(fleet.longest_session(), 30)  # none was ever there
    answers[:] = [[heartbeat()]]
    assert await fleet.longest_session() == 100
    answers[:] = [[], BrokersError("Redis is away"), TimeoutError(), [], [heartbeat()]]
    assert await asyncio.gather(*(fleet.longest_session() for _ in range(5))) == [100] * 5
    answers[:] = [[heartbeat(fingerprint="other")]]
    with pytest.raises(ApiError, match="another model"):
        await asyncio.wait_for(fleet.longest_session(), 30)


async def test_requests_wait_for_silent_verifiers_no_longer_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.fleet.FRESH_S", 0.0)
    beats, reads = [heartbeat()], 0

    async def read() -> list[Heartbeat]:
        nonlocal reads
        reads += 1
        return beats

    fleet = Fleet(read, "f", wait_s=1.2)
    await fleet.longest_session()
    beats.clear()
    started = monotonic()
    with pytest.raises(ApiError, match=r"no verifier is running: none has sent a heartbeat for at least 1 s"):
        await fleet.longest_session()
    assert 1.2 <= monotonic() - started < 60
    reads = 0
    with pytest.raises(ApiError):
        await fleet.longest_session()
    assert (await fleet.missing())["verifier"] is not None
    assert reads == 2, "they are gone, so nobody waits for them any more"


async def test_the_fleet_is_exported_by_arithmetic_and_a_mixture_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.fleet.FRESH_S", 0.0)
    beats = [heartbeat(arithmetic="wisp-1"), heartbeat(arithmetic="wisp-1"), heartbeat()]
    others = [heartbeat(arithmetic="other", draining=True), heartbeat(arithmetic="other", fingerprint="another")]

    async def read() -> list[Heartbeat]:
        return [*beats, *others]

    def exported() -> dict[str, float]:
        (metric,) = metrics.VERIFIERS.collect()
        return {sample.labels["arithmetic"]: sample.value for sample in metric.samples}

    fleet = Fleet(read, "f")
    with structlog.testing.capture_logs() as logs:
        await fleet.longest_session()
        assert (fleet.arithmetics, exported()) == ({"wisp-1", ""}, {"wisp-1": 2, "unknown": 1})
        assert not logs
        beats[0] = heartbeat(arithmetic="other")
        for _ in range(2):
            await fleet.longest_session()
        assert exported() == {"other": 1, "wisp-1": 1, "unknown": 1}
        assert [(line["log_level"], line["arithmetics"]) for line in logs] == [("warning", ["other", "wisp-1"])]
        beats.clear()
        with pytest.raises(ApiError):
            await fleet.longest_session()
        assert (fleet.arithmetics, exported()) == (set(), {})
        assert [line["log_level"] for line in logs] == ["warning", "info"]


async def test_the_fleet_is_followed_without_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.fleet.FOLLOW_S", 0.0)
    found: list[list[Heartbeat]] = [[], [heartbeat(arithmetic="wisp-1")]]

    async def read() -> list[Heartbeat]:
        return found.pop(0) if len(found) > 1 else found[0]

    fleet = Fleet(read, "f")
    following = asyncio.create_task(fleet.follow())
    await eventually(lambda: fleet.arithmetics == {"wisp-1"})
    following.cancel()


async def test_a_request_at_the_moment_of_a_read_gets_its_result() -> None:
    late: list[asyncio.Task[int]] = []

    async def beats() -> list[Heartbeat]:
        # Runs after this returns and before the waiting requests continue.
        asyncio.get_running_loop().call_soon(lambda: late.append(asyncio.create_task(fleet.longest_session())))
        return [heartbeat(max_len=100)]

    fleet = Fleet(beats, "f")
    assert await fleet.longest_session() == 100
    assert [await task for task in late] == [100]
