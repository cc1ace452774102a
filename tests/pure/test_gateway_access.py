"""Access to the API: content types, host names, pages of other origins and keys."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from gateway_app import HELLO, App, error_of

from services.gateway.keys import new_key, render
from shared.models.folder import ModelFolder

FOREIGN_TYPES = (
    "text/plain",
    "text/plain; application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "text/json",
    "",
)


@pytest.mark.parametrize("content_type", FOREIGN_TYPES)
async def test_without_keys_only_json_types_are_taken(app: App, content_type: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = json.dumps(HELLO | {"prompt": "x"}).encode()
        response = await app.http.post(path, content=body, headers={"content-type": content_type})
        assert error_of(response, 415)["code"] == "unsupported_content_type"
    assert app.generated == []
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
        body = json.dumps(HELLO).encode()
        assert (
            await app.http.post("/v1/chat/completions", content=body, headers={"content-type": kind})
        ).status_code == 200


@pytest.mark.parametrize("content_type", FOREIGN_TYPES)
async def test_with_a_key_the_content_type_does_not_matter(guarded: tuple[App, str], content_type: str) -> None:
    app, key = guarded
    headers = {"content-type": content_type, "authorization": f"Bearer {key}", "host": "evil.example"}
    response = await app.http.post("/v1/chat/completions", content=json.dumps(HELLO).encode(), headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "notlocalhost", "", "["]
)
async def test_without_keys_foreign_host_names_are_refused(app: App, host: str) -> None:
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/ready"), ("GET", "/")):
        response = await app.http.request(method, path, json=HELLO, headers={"host": host})
        assert error_of(response, 403)["code"] == "host_not_allowed"
        assert "WISP_ALLOWED_HOSTS" in response.text
    assert app.generated == []


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8000", "localhost.", "wisp.localhost"),
        *("127.0.0.1:8000", "[::1]:8000", "10.0.0.7:8000", "[fe80::1]"),
    ],
)
async def test_without_keys_loopback_names_and_addresses_are_served(app: App, host: str) -> None:
    """A page cannot make an address its name, so addresses are harmless."""
    assert (await app.http.get("/v1/models", headers={"host": host})).status_code == 200


async def test_a_setting_allows_more_host_names(folder: ModelFolder) -> None:
    app = App(folder, allowed_hosts="gateway, wisp.example.org")
    for host, status in (("gateway:8000", 200), ("WISP.example.org", 200), ("localhost", 200), ("other", 403)):
        assert (await app.http.get("/v1/models", headers={"host": host})).status_code == status
    app = App(folder, allowed_hosts="*")
    assert (await app.http.get("/v1/models", headers={"host": "anything.example"})).status_code == 200


ASKS = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}


async def test_cors_is_off_by_default(app: App) -> None:
    response = await app.http.options("/v1/chat/completions", headers=ASKS)
    assert response.headers["allow"] == "POST, OPTIONS"
    answered = await app.http.post("/v1/chat/completions", json=HELLO, headers={"origin": ASKS["origin"]})
    for headers in (response.headers, answered.headers):
        assert not any(name.startswith("access-control-") for name in headers)


@pytest.mark.parametrize("origins", ["https://chat.example.org", "http://localhost:3000,https://chat.example.org", "*"])
async def test_pages_of_allowed_origins_may_use_the_api(folder: ModelFolder, tmp_path: Path, origins: str) -> None:
    text, key = new_key("tests", datetime.now(UTC))
    (tmp_path / "keys.json").write_text(render([key]))
    for fields, more in (({}, {}), ({"api_keys_file": tmp_path / "keys.json"}, {"authorization": f"Bearer {text}"})):
        app = App(folder, cors_origins=origins, **fields)
        wanted = ASKS | {"access-control-request-headers": "authorization, content-type, x-stainless-lang"}
        asked = await app.http.options("/v1/chat/completions", headers=wanted)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] in (ASKS["origin"], "*")
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        origin = {"origin": ASKS["origin"]}
        for stream in (False, True):
            answer = await app.http.post("/v1/chat/completions", json=HELLO | {"stream": stream}, headers=origin | more)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] in (ASKS["origin"], "*")
            assert "x-wisp-seed" in answer.headers["access-control-expose-headers"]
        refused = await app.http.post("/v1/chat/completions", content=b"{", headers=origin | more)
        assert refused.status_code == 400
        assert "access-control-allow-origin" in refused.headers


async def test_pages_of_other_origins_may_not(folder: ModelFolder) -> None:
    app = App(folder, cors_origins="https://chat.example.org")
    asked = await app.http.options("/v1/chat/completions", headers=ASKS | {"origin": "https://evil.example"})
    assert asked.status_code == 400
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/completions", "/metrics", "/nowhere"])
@pytest.mark.parametrize("header", [None, "Bearer wisp-nonsense", "Basic d2lzcA==", "Bearer ", "bearer \xe9", "Bearer"])
async def test_without_a_valid_key_nothing_is_served(guarded: tuple[App, str], path: str, header: str | None) -> None:
    app, _ = guarded
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    response = await app.http.post(path, json=HELLO, headers=headers)  # type: ignore[arg-type]
    error = error_of(response, 401)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert app.generated == []


async def test_only_the_exact_key_is_accepted(guarded: tuple[App, str]) -> None:
    app, key = guarded
    good = {"authorization": f"Bearer {key}"}
    assert (await app.http.post("/v1/chat/completions", json=HELLO, headers=good)).status_code == 200
    for wrong in (key[:-1], key + "A", key[:-1] + ("A" if key[-1] != "A" else "B"), key.replace("wisp", "wosp")):
        answer = await app.http.get("/v1/models", headers={"authorization": f"Bearer {wrong}"})
        assert error_of(answer, 401)["code"] == "invalid_api_key"
        assert wrong not in answer.text


async def test_probes_need_no_key_and_get_no_addresses(guarded: tuple[App, str]) -> None:
    app, key = guarded
    app.upstream.problems = {"redis": "10.1.2.3 does not answer"}
    assert (await app.http.get("/health")).status_code == 200
    stranger = await app.http.get("/ready")
    assert stranger.status_code == 503
    assert stranger.json()["parts"] == {"redis": "not ok", "gateway": "ok"}
    holder = await app.http.get("/ready", headers={"authorization": f"Bearer {key}"})
    assert holder.json()["parts"] == {"redis": "10.1.2.3 does not answer", "gateway": "ok"}
