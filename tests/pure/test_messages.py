"""Messages: what goes over the wire comes back, and nothing else is taken for a message."""

from __future__ import annotations

from contextlib import suppress

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import MessageError
from shared.messages import (
    MESSAGES,
    SCHEMA_VERSION,
    Batch,
    BatchShape,
    Cancel,
    ClassLoad,
    CostModel,
    DrafterHeartbeat,
    Ended,
    Failure,
    Finish,
    Generate,
    Halt,
    Heartbeat,
    HiddenFormat,
    HiddenStates,
    Job,
    Load,
    Measurement,
    Message,
    Release,
    Residency,
    Result,
    RunGrant,
    Sample,
    Sampling,
    Slo,
    Status,
    Verify,
    decode,
    decode_group,
    encode,
    encode_group,
    ungroup,
)

JOB = Job(session="s", round=2, base_len=9, draft=[4], drafted=3, drafter="d", gateway="g", fingerprint="f", reason="r")
EXAMPLES: list[Message] = [
    Generate(
        session="chatcmpl-1",
        gateway="g",
        prompt=[1, 2, 3],
        sampling=Sampling(temperature=0.7, top_p=0.9, top_k=5, seed=-(2**63)),
        stop_ids=[2],
        max_tokens=7,
        fingerprint="f",
        vocab_fingerprint="v",
        slo=Slo(ttft_ms=500.0, tpot_ms=50.0),
        elapsed_ms=1.5,
    ),
    Verify(
        session="s",
        round=0,
        base_len=3,
        draft=[],
        acceptance=[],
        drafter="d",
        gateway="g",
        fingerprint="f",
        slack_ms=-4.0,
    ),
    Batch(batch="b-1", scheduler="x", jobs=[JOB], predicted_ms=40.0, policy="edf"),
    Result(
        session="s",
        round=1,
        base_len=3,
        status=Status.COMMITTED,
        verifier="v",
        batch="b",
        accepted=1,
        tokens=[5, 6],
        finish=Finish.STOP,
    ),
    Result(
        session="s",
        round=1,
        base_len=3,
        status=Status.FAILED,
        verifier="v",
        batch="b",
        error=Failure(code="session_gone", message="gone"),
    ),
    Verify(
        session="s",
        round=0,
        base_len=3,
        draft=[4],
        acceptance=[0.5],
        drafter="d",
        gateway="g",
        fingerprint="f",
        hidden_from=0,
        hidden_format=HiddenFormat.INT8,
    ),
    Result(session="s", round=1, base_len=3, status=Status.COMMITTED, verifier="v", batch="b", tokens=[5]),
    Verify(
        session="s",
        round=2,
        base_len=6,
        draft=[],
        acceptance=[],
        drafter="d",
        gateway="g",
        fingerprint="f",
        run_tokens=32,
    ),
    Batch(
        batch="b-2",
        scheduler="x",
        lease=4,
        jobs=[JOB.model_copy(update={"prefill_to": None, "run": RunGrant(tokens=32, ms=2000.0)})],
        predicted_ms=40.0,
        policy="wisp+",
    ),
    Result(
        session="s",
        round=3,
        base_len=6,
        status=Status.COMMITTED,
        verifier="v",
        batch="run",
        tokens=[5, 6],
        run=True,
        run_left=30,
    ),
    HiddenStates(session="s", round=1, start=9, count=2, size=3, rows=bytes(range(12))),
    HiddenStates(
        session="s", round=1, start=0, count=2, size=3, format=HiddenFormat.INT8, rows=b"\xff" * 6, scales=b"\0" * 8
    ),
    Sample(
        verifier="v",
        batches=[Measurement(shape=BatchShape(jobs=1, new_tokens=2, new_context=30, context=15), measured_ms=3.0)],
    ),
    CostModel(verifier="v", coefficients=[1.0] * 5, ratio_p50=1.0, ratio_p90=1.2, ratio_p99=2.0, samples=4, version=9),
    Load(
        scheduler="x",
        price_ms=0.5,
        queue_ms=3.0,
        pending=4,
        draft_cap=8,
        policy="wisp",
        utilization=1.2,
        verify_ms=[20.0, 21.5, 23.0],
        classes=[ClassLoad(service_class="priority", sessions=3, waiting=1, queue_ms=2.0, slack_ms=-4.0)],
    ),
    Release(sessions=["s", "t"]),
    Halt(sessions=["s"]),
    Ended(session="s", reason="stop", slo=Slo(ttft_ms=100.0, tpot_ms=20.0), tokens=3, ttft_ms=9.0, attained=True),
    Cancel(session="s", reason="client left"),
    Heartbeat(
        verifier="v",
        fingerprint="f",
        max_len=100,
        free_tokens=50,
        total_tokens=100,
        residency=[Residency(session="s", cached=12)],
    ),
    DrafterHeartbeat(drafter="d", pool="p", sessions=3, max_sessions=64, drafts=False),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.type_name)
def test_every_message_comes_back_as_it_went(message: Message) -> None:
    assert decode(encode(message)) == message


def test_a_group_comes_back_as_it_went() -> None:
    results = [example for example in EXAMPLES if isinstance(example, Result)]
    assert len(results) > 2
    body = encode_group(results)
    assert decode_group(body) == results
    assert [decode(one) for one in ungroup(body)] == results


def test_a_message_alone_is_no_group() -> None:
    for message in EXAMPLES:
        assert encode_group([message]) == encode(message)
        assert decode_group(encode(message)) == [message]
        assert ungroup(encode(message)) == [encode(message)]
    assert ungroup(b"not msgpack") == [b"not msgpack"]


def test_a_reader_of_the_version_before_takes_the_first_of_a_group() -> None:
    first, *others = (example for example in EXAMPLES if isinstance(example, Result))
    assert decode(encode_group([first, *others])) == first


@pytest.mark.parametrize("more", [7, [7], {"t": "Result"}, [{"t": "Result"}], [{"t": "Nothing", "v": 1}]])
def test_a_group_with_a_bad_message_is_rejected(more: object) -> None:
    fields = msgpack.unpackb(encode(next(example for example in EXAMPLES if isinstance(example, Result))))
    with pytest.raises(MessageError):
        decode_group(msgpack.packb({**fields, "more": more}))


def test_every_kind_of_message_has_an_example() -> None:
    assert {type(example) for example in EXAMPLES} == set(MESSAGES.values())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.type_name)
def test_unknown_fields_are_ignored_and_missing_or_ill_typed_ones_rejected(message: Message) -> None:
    fields = msgpack.unpackb(encode(message))
    assert decode(msgpack.packb({**fields, "v": SCHEMA_VERSION + 1, "from_the_future": [1, {"x": 2}]})) == message
    required = [name for name, field in type(message).model_fields.items() if field.is_required()]
    for name in required:
        without = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(MessageError, match=f"{message.type_name}: {name}"):
            decode(msgpack.packb(without))
        with pytest.raises(MessageError, match=f"{message.type_name}: {name}"):
            decode(msgpack.packb({**fields, name: b"not this"}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_len", 0),
        ("base_len", "3"),
        ("base_len", True),
        ("round", -1),
        ("draft", [1, -1]),
        ("draft", [2**31]),
        ("draft", [1] * 2000),
        ("acceptance", [1.5]),
        ("slack_ms", float("nan")),
        ("session", ""),
        ("session", "a b"),
        ("session", "x" * 200),
        ("committed_in", ["two\nlines"]),
        ("committed_in", ["x" * 300]),
    ],
)
def test_values_out_of_range_are_rejected(field: str, value: object) -> None:
    fields = msgpack.unpackb(encode(EXAMPLES[1])) | {field: value}
    with pytest.raises(MessageError, match=field):
        decode(msgpack.packb(fields))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rows", b"x" * 5, "rows: .*5 bytes, but 2 rows of 3 in int8 need 6"),
        ("rows", b"", "rows: .*0 bytes"),
        ("count", 3, "rows: .*need 9"),
        ("count", 0, "count"),
        ("size", 2**40, "rows: .*need 2199023255552"),
        ("size", 0, "size"),
        ("scales", b"x" * 7, "scales: .*7 bytes, but 2 rows of 3 in int8 need 8"),
        ("scales", b"", "scales: .*need 8"),
        ("format", "bfloat16", "rows: .*need 12"),
        ("format", "float3", "format"),
    ],
)
def test_hidden_states_must_be_whole(field: str, value: object, said: str) -> None:
    whole = next(m for m in EXAMPLES if isinstance(m, HiddenStates) and m.format is HiddenFormat.INT8)
    fields = msgpack.unpackb(encode(whole)) | {field: value}
    with pytest.raises(MessageError, match=rf"HiddenStates: (.*; )?{said}"):
        decode(msgpack.packb(fields))
    with pytest.raises(MessageError, match=r"scales: .*8 bytes, but .* need 0"):
        decode(
            msgpack.packb(fields | {"format": "bfloat16", "count": 2, "size": 3, "rows": b"x" * 12, "scales": b"8" * 8})
        )


def test_hidden_states_travel_as_they_are() -> None:
    rows = bytes(range(256)) * 4
    body = encode(HiddenStates(session="s", round=1, start=0, count=2, size=256, rows=rows))
    assert rows in body
    assert len(body) < len(rows) + 80


def test_messages_of_a_drafter_that_knows_no_hidden_states_are_understood() -> None:
    old = {"session": "s", "round": 0, "base_len": 3, "draft": [], "drafter": "d", "gateway": "g", "fingerprint": "f"}
    verify = decode(msgpack.packb({"t": "Verify", "v": 1, "acceptance": [], **old}))
    assert isinstance(verify, Verify)
    assert verify.hidden_from is None
    assert b"hidden" not in encode(verify), "nor does one that wants none say so"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_error_and_nothing_else(body: bytes) -> None:
    with pytest.raises(MessageError):
        decode(body)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | st.floats()
        | st.text(max_size=8)
        | st.binary(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )
)
def test_arbitrary_msgpack_is_a_message_error_and_nothing_else(value: object) -> None:
    with pytest.raises(MessageError):
        decode(msgpack.packb(value))


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_damaged_message_never_raises_anything_else(message: Message, data: st.DataObject) -> None:
    body = bytearray(encode(message))
    position = data.draw(st.integers(0, len(body) - 1))
    body[position] = data.draw(st.integers(0, 255))
    with suppress(MessageError):
        decode(bytes(body))
