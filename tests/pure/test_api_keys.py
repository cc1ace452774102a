"""API keys: their file, the check of a key, rate-limit headers, and the `wisp keys` command."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.gateway.keys import KeyFile, KeyLimits, KeyRing, new_key, parse, render
from services.gateway.ledger import duration
from services.gateway.settings import GatewaySettings, is_loopback
from services.tools.cli.main import app
from shared.errors import SettingsError

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_a_key_is_recognised_by_its_hash_alone() -> None:
    text, key = new_key("ann", NOW, KeyLimits(requests_per_minute=3))
    other, _ = new_key("bob", NOW)
    (read,) = parse(render([key]), "keys.json")
    assert read == key
    assert text.split("-", 2)[2] not in render([key])
    ring = KeyRing([read])
    assert ring.match(text) == key
    # The right id with another secret, another key, and texts that are no keys.
    for wrong in (f"wisp-{key.id}-{other[18:]}", other, "", "wisp-", text + " ", "\udce9" * 61):
        assert ring.match(wrong) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "array"),
        ("[", "JSON"),
        ('[{"id": "0123456789ab"}]', "[0].name: is missing"),
        ("[1]", "[0]"),
    ],
)
def test_an_invalid_file_is_refused_with_the_position(text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=r"keys\.json") as caught:
        parse(text, "keys.json")
    assert said.lower() in str(caught.value).lower()


def test_keys_with_the_same_name_are_refused() -> None:
    keys = [new_key("ann", NOW)[1], new_key("ann", NOW)[1]]
    with pytest.raises(SettingsError, match="two keys have the name 'ann'"):
        parse(render(keys), "keys.json")


def test_an_error_does_not_repeat_a_secret_of_the_file() -> None:
    text, key = new_key("ann", NOW)
    fields = json.loads(render([key]))
    fields[0]["sha256"] = text
    with pytest.raises(SettingsError) as caught:
        parse(json.dumps(fields), "keys.json")
    assert text not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "", "10.0.0.1", "example.org", "192.168.1.7")],
)
def test_beyond_loopback_a_gateway_needs_keys(host: str, loopback: bool, tmp_path: Path) -> None:
    assert is_loopback(host) == loopback
    given = {"host": host, "target": tmp_path}
    if loopback:
        GatewaySettings.model_validate(given)
    else:
        with pytest.raises(ValueError, match="WISP_API_KEYS_FILE"):
            GatewaySettings.model_validate(given)
    GatewaySettings.model_validate(given | {"api_keys_file": tmp_path / "keys.json"})
    GatewaySettings.model_validate(given | {"unsafe_serve_everybody": True})


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="wisp keys new"):
        KeyFile(tmp_path / "keys.json")


def test_an_unreadable_file_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(self: Path, encoding: str) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", closed)
    with pytest.raises(SettingsError, match=rf"user {os.geteuid()} of this process may not read .*keys.json"):
        KeyFile(tmp_path / "keys.json")


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0s"), (1, "1ms"), (999, "999ms"), (1000, "1s"), (1500, "1.5s"), (60_000, "1m0s"), (90_001, "1m31s")],
)
def test_durations_have_openais_format(ms: int, text: str) -> None:
    assert duration(ms) == text


def wisp(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return f"{result.stdout}{result.stderr}" if result.exit_code else result.stdout


def test_keys_are_made_listed_and_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.json"
    monkeypatch.setenv("WISP_API_KEYS_FILE", str(file))
    first = wisp("keys", "new", "ann", "--tokens-per-minute", 9000).strip()
    second = wisp("keys", "new", "bob").strip()
    assert file.stat().st_mode & 0o777 == 0o600
    assert first not in file.read_text()
    ring = KeyFile(file).ring
    ann, bob = ring.match(first), ring.match(second)
    assert ann is not None
    assert bob is not None
    assert (ann.name, ann.tokens_per_minute, bob.tokens_per_minute) == ("ann", 9000, None)
    shown = wisp("keys", "list")
    assert "9,000" in shown
    assert ann.sha256 not in shown
    assert "a key named 'ann' exists" in wisp("keys", "new", "ann")
    wisp("keys", "revoke", "ann")
    wisp("keys", "revoke", bob.id)
    assert len(KeyFile(file).ring) == 0
    assert "no key has the id or name 'ann'" in wisp("keys", "revoke", "ann")


def test_a_changed_key_file_keeps_its_owner_and_mode(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    wisp("keys", "new", "ann", "--file", file)
    file.chmod(0o644)
    owner = (10001, 10001) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(file, *owner)
    wisp("keys", "revoke", "ann", "--file", file)
    about = file.stat()
    assert (about.st_mode & 0o777, about.st_uid, about.st_gid) == (0o644, *owner)
    assert len(KeyFile(file).ring) == 0


def test_a_missing_file_has_no_keys_to_list_or_revoke(tmp_path: Path) -> None:
    for words in (["list"], ["revoke", "ann"]):
        result = CliRunner().invoke(app, ["keys", *words, "--file", str(tmp_path / "none.json")])
        assert result.exit_code == 1
        assert "there is no file" in result.stderr
        assert not result.stdout


def test_wrong_arguments_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WISP_API_KEYS_FILE", raising=False)
    assert "--file FILE" in wisp("keys", "list")
    assert "letters, digits" in wisp("keys", "new", "a b", "--file", tmp_path / "keys.json")
    assert not (tmp_path / "keys.json").exists()
    (tmp_path / "other.json").write_text("hello")
    assert "other.json" in wisp("keys", "new", "ann", "--file", tmp_path / "other.json")
    assert (tmp_path / "other.json").read_text() == "hello"
