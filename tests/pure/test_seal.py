"""Keys of sessions: good for one session as it was given, and for nothing else."""

from __future__ import annotations

from typing import Any

import builders
import pytest

from services.tools.replayer.core.redaction import redacted
from shared.broker.seal import Seal
from shared.messages import Generate, Job, Slo, Verify, decode, encode
from shared.runtime.settings import SealSettings, problems_of

SEAL = Seal("x" * 32)


def generate(**fields: Any) -> Generate:
    slo = Slo(ttft_ms=100, tpot_ms=12.3456789)
    return builders.generate(slo=slo, service_class="priority", **fields)


def verify(key: str, **fields: Any) -> Verify:
    plain = {"tpot_ms": 12.3456789, "service_class": "priority", "session_key": key}
    return builders.verify(**(plain | fields))


def test_who_was_given_a_session_shows_its_key_over_the_wire() -> None:
    given = decode(encode(SEAL.sealed(generate())))
    assert isinstance(given, Generate)
    assert len(given.session_key) == 32
    shown = decode(encode(verify(given.session_key)))
    assert isinstance(shown, Verify)
    assert SEAL.fits(shown)
    assert SEAL.fits(shown.model_copy(update={"round": 7, "draft": [1, 2], "drafter": "another", "slack_ms": -5.0}))


@pytest.mark.parametrize(
    "changed",
    [
        {"session": "t"},
        {"gateway": "h"},
        {"service_class": "default"},
        {"tpot_ms": 1.0},
        {"tpot_ms": None},
        {"session_key": ""},
        {"session_key": "0" * 32},
    ],
)
def test_what_the_gateway_decided_cannot_be_changed(changed: dict[str, object]) -> None:
    key = SEAL.sealed(generate()).session_key
    assert not SEAL.fits(verify(key, **changed))


def test_parts_cannot_be_moved_from_one_field_to_the_next() -> None:
    assert SEAL.key("ab", "c", "d", None) != SEAL.key("a", "bc", "d", None)
    assert SEAL.key('a","b', "c", "d", None) != SEAL.key("a", "b", "c", None)


def test_another_secret_makes_other_keys_and_none_asks_for_none() -> None:
    key = SEAL.sealed(generate()).session_key
    assert not Seal("y" * 32).fits(verify(key))
    assert Seal(None).sealed(generate()).session_key == ""
    assert Seal(None).fits(verify(""))
    assert Seal(None).fits(verify(key)), "drafters may still show keys while the secret is being taken away"
    assert not SEAL.fits(
        Job.model_validate(verify(key).model_dump() | {"drafted": 0, "tpot_ms": 9.0, "draft": [], "session_key": key})
    )


def test_a_short_secret_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="shorter than 32 characters") as refused:
        SealSettings.model_validate({"session_secret": "hunter2"})
    assert "hunter2" not in str(problems_of(refused.value))  # type: ignore[arg-type]


def test_a_recording_without_text_holds_no_keys() -> None:
    given = SEAL.sealed(generate())
    job = Job.model_validate(verify(given.session_key).model_dump() | {"drafted": 0})
    batch = builders.batch("b1", job)
    for message in (given, verify(given.session_key), batch):
        assert given.session_key.encode() in encode(message)
        assert given.session_key.encode() not in encode(redacted(message))
