"""Services of neighbouring versions side by side, as in a rolling update: today's and those of the recorded commits.

`messages_of_earlier_versions.json` has of each its messages as they were on the wire, and which fields its readers
require. After a change of the messages that is released, add today's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import builders
import msgpack
import pytest
from test_messages import EXAMPLES

from shared import messages
from shared.messages import decode, encode

EARLIER: dict[str, Any] = json.loads(Path(__file__).with_name("messages_of_earlier_versions.json").read_text())


@pytest.mark.parametrize("version", EARLIER)
def test_todays_services_read_what_earlier_ones_send(version: str) -> None:
    for text in EARLIER[version]["messages"]:
        body = bytes.fromhex(text)
        sent = msgpack.unpackb(body)
        read = decode(body)
        assert read.type_name == sent["t"]
        again = msgpack.unpackb(encode(read))
        for key, value in sent.items():
            # Some lists have become longer, as a cost model's coefficients: what was there is still there.
            kept = again[key][: len(value)] if isinstance(value, list) else again[key]
            assert kept == value, f"{read.type_name}.{key}"


@pytest.mark.parametrize("version", EARLIER)
def test_earlier_services_get_every_field_that_they_require(version: str) -> None:
    for example in EXAMPLES:
        required = EARLIER[version]["required"].get(example.type_name)
        if required is not None:  # a type that they do not know yet
            assert set(required) <= msgpack.unpackb(encode(example)).keys(), example.type_name
    for name, required in EARLIER[version]["required"].items():
        assert set(required) <= getattr(messages, name).model_fields.keys(), name


@pytest.mark.parametrize(("policy", "first_come"), [("fcfs", True), ("sled", True), ("edf", False), ("wisp+", False)])
def test_the_order_of_an_earlier_schedulers_policy_is_known(policy: str, first_come: bool) -> None:
    sent = msgpack.unpackb(encode(builders.load(policy=policy)))
    sent.pop("first_come", None)
    read = decode(msgpack.packb(sent))
    assert isinstance(read, messages.Load)
    assert read.first_come is first_come
