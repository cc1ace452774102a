"""Options of chats in the bodies of the other APIs that make chats: supported, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_app import HELLO, MODEL

from services.gateway.body import parse
from services.gateway.chat_form import ChatForm
from services.gateway.errors import ApiError
from services.gateway.messages_api import CountRequest, MessagesRequest
from services.gateway.responses_api import ResponsesRequest
from services.gateway.schema import ChatRequest

BODIES: dict[type[ChatForm], dict[str, Any]] = {
    ResponsesRequest: {"model": MODEL, "input": "Hi"},
    MessagesRequest: HELLO | {"max_tokens": 5},
    CountRequest: HELLO,
}
LACKING = [
    (kind, name)
    for kind in BODIES
    for name in sorted(ChatRequest.model_fields.keys() - kind.model_fields.keys() - kind.without_effect)
]
DEFAULTS = ChatRequest(**HELLO).model_dump(mode="json", exclude={"tool_choice"})


def parsed(kind: type[ChatForm], **options: Any) -> ChatForm:
    return parse(kind, json.dumps(BODIES[kind] | options).encode())


@pytest.mark.parametrize(("kind", "name"), LACKING)
def test_an_option_that_only_chats_have_is_refused_by_name(kind: type[ChatForm], name: str) -> None:
    with pytest.raises(ApiError) as caught:
        parsed(kind, **{name: "other"})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_parameter")
    assert caught.value.message.startswith(f"{name} is not supported here")


@pytest.mark.parametrize(("kind", "name"), LACKING)
def test_null_and_the_default_are_accepted(kind: type[ChatForm], name: str) -> None:
    without = parsed(kind)
    assert parsed(kind, **{name: None}) == without
    if name not in ("messages", "tool_choice"):  # without a default in JSON
        assert parsed(kind, **{name: DEFAULTS[name]}) == without


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"response_format": {"type": "text"}}, True),
        ({"response_format": {"type": "json_object"}}, False),
        ({"wisp": {"trace": False}}, True),
        ({"wisp": {"trace": True}}, False),
        ({"wisp": {"trace": 5}}, False),
        ({"presence_penalty": 0}, True),
        ({"presence_penalty": False}, False),
        ({"logit_bias": {"5": -100}}, False),
        ({"continue_final_message": True}, False),
    ],
)
def test_parts_of_an_option_count_by_their_effect(
    kind: type[ChatForm], options: dict[str, Any], accepted: bool
) -> None:
    if accepted:
        assert parsed(kind, **options) == parsed(kind)
        return
    with pytest.raises(ApiError) as caught:
        parsed(kind, **options)
    assert caught.value.param == next(iter(options))


def test_a_count_takes_the_body_of_its_message() -> None:
    options = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.5, "top_k": 5, "stop_sequences": ["x"], "stream": True}
    parsed(MessagesRequest, **options)
    assert parsed(CountRequest, **options) == parsed(CountRequest)
