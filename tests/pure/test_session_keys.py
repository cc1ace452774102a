"""Session keys: good for one session as its gateway gave it, and for nothing else."""

from __future__ import annotations

from typing import Any

import builders
import pytest

from services.tools.replayer.core.redaction import redacted
from shared.broker.session_keys import SessionKeys
from shared.messages import Generate, Job, Slo, Verify, decode, encode
from shared.runtime.settings import SessionSecretSettings
from shared.runtime.settings_loading import problems_of

KEYS = SessionKeys("x" * 32)


def generate(**fields: Any) -> Generate:
    slo = Slo(ttft_ms=100, tpot_ms=12.3456789)
    return builders.generate(slo=slo, service_class="priority", **fields)


def verify(key: str, **fields: Any) -> Verify:
    plain = {"tpot_ms": 12.3456789, "service_class": "priority", "session_key": key}
    return builders.verify(**(plain | fields))


def test_a_drafter_shows_the_key_of_its_session_over_the_wire() -> None:
    given = decode(encode(KEYS.add_to(generate())))
    assert isinstance(given, Generate)
    assert len(given.session_key) == 32
    shown = decode(encode(verify(given.session_key)))
    assert isinstance(shown, Verify)
    assert KEYS.accepts(shown)
    assert KEYS.accepts(shown.model_copy(update={"round": 7, "draft": [1, 2], "drafter": "another", "slack_ms": -5.0}))


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
def test_a_round_that_changes_a_covered_field_is_refused(changed: dict[str, object]) -> None:
    key = KEYS.add_to(generate()).session_key
    assert not KEYS.accepts(verify(key, **changed))


def test_text_cannot_move_from_one_covered_field_to_the_next() -> None:
    assert KEYS.key("ab", "c", "d", None) != KEYS.key("a", "bc", "d", None)
    assert KEYS.key('a","b', "c", "d", None) != KEYS.key("a", "b", "c", None)


def test_another_secret_makes_other_keys_and_no_secret_requires_none() -> None:
    key = KEYS.add_to(generate()).session_key
    assert not SessionKeys("y" * 32).accepts(verify(key))
    assert SessionKeys(None).add_to(generate()).session_key == ""
    assert SessionKeys(None).accepts(verify(""))
    assert SessionKeys(None).accepts(verify(key)), "drafters may still show keys while the secret is being removed"
    assert not KEYS.accepts(
        Job.model_validate(verify(key).model_dump() | {"drafted": 0, "tpot_ms": 9.0, "draft": [], "session_key": key})
    )


def test_a_short_secret_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="shorter than 32 characters") as refused:
        SessionSecretSettings.model_validate({"session_secret": "hunter2"})
    assert "hunter2" not in str(problems_of(refused.value))  # type: ignore[arg-type]


def test_a_redacted_recording_contains_no_keys() -> None:
    given = KEYS.add_to(generate())
    job = Job.model_validate(verify(given.session_key).model_dump() | {"drafted": 0})
    batch = builders.batch("b1", job)
    for message in (given, verify(given.session_key), batch):
        assert given.session_key.encode() in encode(message)
        assert given.session_key.encode() not in encode(redacted(message))
