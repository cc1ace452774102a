"""The fleet behind the gateway: missing, full, its pools and promises, and what the gateway counts and reports."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import builders
import pytest
from gateway_app import HELLO, MODEL, App, error_of, grown, samples
from gateway_peer import Script, eventually

from shared.broker import topology
from shared.errors import BrokersError, Unroutable
from shared.messages import Load, Slo
from shared.models.folder import ModelFolder


async def test_without_a_verifier_requests_get_a_503(app: App) -> None:
    app.upstream.verifiers = False
    response = await app.chat()
    error_of(response, 503)
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("error", "code"), [(Unroutable("no queue"), "no_drafter"), (BrokersError("down"), "brokers_unavailable")]
)
@pytest.mark.parametrize("stream", [True, False])
async def test_without_a_drafter_or_broker_requests_get_a_503(
    app: App, error: Exception, code: str, stream: bool
) -> None:
    app.services.error = error
    response = await app.chat(stream=stream)
    assert error_of(response, 503)["code"] == code
    assert int(response.headers["retry-after"]) >= 1
    assert app.sessions.running == 0


async def test_too_many_sessions_are_refused_and_leave_nothing_behind(folder: ModelFolder) -> None:
    app = App(folder, max_sessions=2)
    response = await app.chat(n=3)
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    assert app.sessions.running == 0
    assert (await app.chat(n=2)).status_code == 200
    assert (await app.chat(n=2)).status_code == 200


def full(**fields: Any) -> Load:
    """Return the Load of a scheduler whose verifiers are promised to 85%."""
    plain = {"scheduler": "s", "price_ms": 0.0, "queue_ms": 0.0, "pending": 0, "draft_cap": 8, "verifiers": 1}
    others = {"service_class": "default", "sessions": 9, "waiting": 0, "queue_ms": 0.0}
    return Load.model_validate(plain | {"utilization": 0.85, "round_ms": 1.0, "classes": [others]} | fields)


async def test_a_full_fleet_refuses_promises_with_a_reason_and_a_retry_time(app: App) -> None:
    await app.sessions.receive(full(utilization=0.95))
    for stream in (True, False):
        response = await app.chat(service_tier="default", n=2, stream=stream)
        error = error_of(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "slo_unattainable_now")
        assert "'default' are promised up to 90%" in error["message"]
        assert response.headers["x-wisp-refused"] == "slo_unattainable_now"
        assert response.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    assert (await app.chat(service_tier="priority")).status_code == 200
    assert len(app.generated) == 1


async def test_a_full_fleet_serves_clients_that_ask_for_no_promise(app: App) -> None:
    await app.sessions.receive(full(utilization=9.0, backlog_ms=60_000.0))
    for options in ({}, {"service_tier": "auto"}, {"service_tier": "flex"}, {"stream": True}):
        assert (await app.chat(**options)).status_code == 200
    assert [generate.slo for generate in app.generated] == [None] * 4
    await app.sessions.receive(full(backlog_ms=1e6))
    assert error_of(await app.chat(), 429)["code"] == "overloaded"


async def test_an_answer_says_that_no_verifier_can_keep_its_slo(app: App) -> None:
    await app.sessions.receive(full(utilization=0.0, fixed_ms=14.0, classes=[]))
    for stream in (True, False):
        body = HELLO | {"stream": stream}
        impossible = await app.http.post("/v1/chat/completions", json=body, headers={"x-slo-tpot-ms": "0.01"})
        assert impossible.status_code == 200
        assert impossible.headers["x-wisp-slo"] == "best-effort; least-tpot-ms=15.0"
        possible = await app.http.post("/v1/chat/completions", json=body, headers={"x-slo-tpot-ms": "15"})
        assert "x-wisp-slo" not in possible.headers
    message = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}
    for path, body in (("/v1/messages", message), ("/v1/responses", {"model": "tiny", "input": "Hi"})):
        answer = await app.http.post(path, json=body, headers={"x-slo-tpot-ms": "0.01"})
        assert answer.headers["x-wisp-slo"].startswith("best-effort"), answer.text


async def test_an_slo_header_does_not_change_the_class(app: App) -> None:
    headers = {"x-llm-d-slo-ttft-ms": "60000", "x-llm-d-slo-tpot-ms": "500"}
    response = await app.http.post(
        "/v1/chat/completions", json=HELLO | {"service_tier": "flex", "wisp": {"trace": True}}, headers=headers
    )
    summary = response.json()["wisp"]["summary"]
    assert summary["service_class"] == "flex"
    assert summary["slo"] == {"ttft_ms": 60000, "tpot_ms": 500}
    assert summary["attained"] is True
    await app.sessions.receive(full())
    refused = await app.http.post("/v1/chat/completions", json=HELLO | {"service_tier": "flex"}, headers=headers)
    assert error_of(refused, 429)["code"] == "slo_unattainable_now"
    assert (await app.http.post("/v1/chat/completions", json=HELLO, headers=headers)).status_code == 200


async def test_the_answer_names_the_tier_used_if_the_request_names_one(app: App) -> None:
    for asked, used in (("priority", "priority"), ("auto", "default"), ("gold", "default"), (None, None)):
        assert (await app.chat(service_tier=asked)).json().get("service_tier") == used
        streamed = await app.chat(service_tier=asked, stream=True)
        chunks = [json.loads(event.partition("data: ")[2]) for event in streamed.text.split("\n\n")[:-2]]
        assert {chunk.get("service_tier") for chunk in chunks} == {used}


async def test_a_request_goes_to_its_pool(app: App) -> None:
    app.services.pools |= {"phones", "cars"}
    await app.chat()
    await app.chat(wisp={"pool": "phones"})
    await app.http.post("/v1/chat/completions", json=HELLO, headers={"x-wisp-pool": "cars"})
    await app.http.post(
        "/v1/chat/completions", json=HELLO | {"wisp": {"pool": "phones"}}, headers={"x-wisp-pool": "cars"}
    )
    assert [pool for pool, _ in app.services.generated] == [topology.DEFAULT_POOL, "phones", "cars", "phones"]
    app.services.pools.remove("phones")
    response = await app.chat(wisp={"pool": "phones"})
    assert "pool 'phones'" in error_of(response, 503)["message"]


async def test_every_completion_is_reported_and_counted_once(folder: ModelFolder) -> None:
    app = App(folder, max_sessions=3, stall_timeout_s=0.2)
    before = samples()
    watching = asyncio.create_task(app.sessions.watch())
    await app.chat(n=2, service_tier="default")
    slow = {"x-slo-ttft-ms": "1e-9", "x-slo-tpot-ms": "1"}
    await app.http.post("/v1/chat/completions", json=HELLO | {"service_tier": "priority"}, headers=slow)
    error_of(await app.chat(n=5, service_tier="flex"), 429)
    app.silent, app.script = True, Script(text="", ends=False)
    error_of(await app.chat(service_tier="flex"), 504)
    await eventually(lambda: len(app.services.ended) == 9)
    watching.cancel()
    ended = app.services.ended
    text = len(Script().text)
    assert len({one.session for one in ended}) == 9
    assert [(one.service_class, one.reason, one.attained, one.tokens) for one in ended] == (
        [("default", "stop", True, text)] * 2
        + [("priority", "stop", False, text)]
        + [("flex", "refused", False, 0)] * 5
        + [("flex", "error", False, 0)]
    )
    assert [one.slo for one in ended[1:4]] == [Slo(ttft_ms=2000, tpot_ms=200), Slo(ttft_ms=1e-9, tpot_ms=1), None]
    assert all(one.ttft_ms is not None and one.tpot_ms is not None for one in ended[:3])
    assert all(one.prompt_tokens == ended[0].prompt_tokens > 0 for one in ended)
    values = grown(before)

    def value(name: str, **labels: str) -> float:
        label = ",".join(f'{key}="{text}"' for key, text in sorted({"model_name": MODEL, **labels}.items()))
        return values[f"wisp_{name}_total{{{label}}}"]

    assert value("slo_requests", service_class="default", attained="true") == 2
    assert value("slo_requests", service_class="priority", attained="false") == 1
    assert value("slo_requests", service_class="flex", attained="false") == 1
    assert value("goodput_tokens", service_class="default") == 2 * text
    assert value("goodput_tokens", service_class="priority") == 0
    assert value("requests_refused", service_class="flex", reason="too_many_sessions") == 5
    of_slo = sum(number for name, number in values.items() if name.startswith("wisp_slo_requests_total"))
    of_success = sum(number for name, number in values.items() if name.startswith("wisp_request_success_total"))
    assert of_slo == of_success == 4


async def test_readiness_names_what_is_missing(app: App) -> None:
    assert (await app.http.get("/ready")).json() == {"ready": True, "parts": {"redis": "ok", "gateway": "ok"}}
    app.upstream.problems = {"redis": None, "verifier": "none"}
    response = await app.http.get("/ready")
    assert response.status_code == 503
    assert response.json() == {"ready": False, "parts": {"redis": "ok", "verifier": "none", "gateway": "ok"}}
    assert (await app.http.get("/health")).status_code == 200


async def test_readiness_names_pools_that_are_served_without_drafters(app: App) -> None:
    await app.sessions.receive(builders.load(without_drafters=["pool"]))
    answer = await app.http.get("/ready")
    assert (answer.status_code, answer.json()["without_drafters"]) == (200, ["pool"])
    await app.sessions.receive(builders.load())
    assert "without_drafters" not in (await app.http.get("/ready")).json()


async def test_readiness_names_no_pool_once_schedulers_are_silent(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.sessions.LOAD_VALID_S", 0.05)
    await app.sessions.receive(builders.load(without_drafters=["pool"]))
    await asyncio.sleep(0.1)
    assert "without_drafters" not in (await app.http.get("/ready")).json()


async def test_counters_agree_with_the_answers(app: App) -> None:
    before = samples()
    app.script = Script(text="abcdefgh", round_len=3)
    usage = (await app.chat()).json()["usage"]
    summary = (await app.chat(wisp={"trace": True})).json()["wisp"]["summary"]
    values = grown(before)
    label = f'{{model_name="{MODEL}"}}'
    assert values[f"wisp_prompt_tokens_total{label}"] == 2 * usage["prompt_tokens"]
    assert values[f"wisp_generation_tokens_total{label}"] == 2 * usage["completion_tokens"] == 16
    assert values[f"wisp_spec_decode_num_drafts_total{label}"] == 2 * summary["rounds"]
    assert values[f"wisp_spec_decode_num_draft_tokens_total{label}"] == 2 * summary["verified"]
    assert values[f"wisp_spec_decode_num_accepted_tokens_total{label}"] == 2 * summary["accepted"] == 12
    by_position = "wisp_spec_decode_num_accepted_tokens_per_pos_total"
    assert [values[f'{by_position}{{model_name="{MODEL}",position="{n}"}}'] for n in (0, 1)] == [6, 6]
    assert values[f'wisp_request_success_total{{finished_reason="stop",model_name="{MODEL}"}}'] == 2
    assert values[f"wisp_num_requests_running{label}"] == 0
    assert values[f"wisp_time_to_first_token_seconds_count{label}"] == 2
    assert values[f"wisp_e2e_request_latency_seconds_count{label}"] == 2
