"""The HTTP application over a transport in memory: routes, requests, refusals and errors."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import structlog
from gateway_app import HELLO, MODEL, App, error_of
from gateway_peer import CONTEXT, Script, results_of, tiny_target

from services.gateway.stream import Chunks
from shared.messages import Generate, Message, Result
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer


async def test_an_answer_reports_its_seed_and_the_request_id(app: App) -> None:
    response = await app.http.post("/v1/chat/completions", json=HELLO, headers={"x-request-id": "mine-1"})
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "mine-1"
    assert int(response.headers["x-wisp-seed"]) == app.generated[0].sampling.seed
    again = await app.chat(seed=-5)
    assert again.headers["x-wisp-seed"] == "-5"
    assert again.headers["x-request-id"].startswith("req_")


async def test_requests_without_a_seed_get_different_ones(app: App) -> None:
    assert len({(await app.chat()).headers["x-wisp-seed"] for _ in range(5)}) == 5


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
async def test_other_methods_are_refused(app: App, method: str) -> None:
    response = await app.http.request(method, "/v1/chat/completions")
    error = error_of(response, 405)
    assert error["code"] == "method_not_allowed"
    assert error["message"] == f"{method} /v1/chat/completions is not allowed; send POST"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/embeddings", "/v1/chat/completions/x", "/docs2", "/%ff"])
async def test_unknown_paths_are_refused(app: App, path: str) -> None:
    assert error_of(await app.http.post(path, json=HELLO), 404)["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/models/tiny/", "/v1/models/tiny"),
        ("/embeddings", None),
        (f"/models/{'x' * 1000}", None),
    ],
)
async def test_an_unknown_path_names_the_one_that_was_meant(app: App, path: str, meant: str | None) -> None:
    message = error_of(await app.http.post(path, json=HELLO), 404)["message"]
    assert ("did you mean " in message) == (meant is not None)
    assert meant is None or f"did you mean {meant}? The base URL ends with /v1 for clients of OpenAI's API" in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "x" * 5000}, 404),
        ({"wisp": {"draft": "x" * 5000}}, 400),
        ({"wisp": {"x" * 5000: True}}, 400),
        ({"seed": 10**250}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "x" * 5000}]}]}, 400),
        ({"chat_template_kwargs": {"x" * 5000: 1}}, 400),
        ({"tool_choice": {"type": "function", "function": {"name": "x" * 5000}}}, 400),
        ({"guided_regex": "(" * 5000}, 400),
    ],
)
async def test_errors_show_the_beginning_of_long_values(app: App, body: dict[str, Any], status: int) -> None:
    error = error_of(await app.http.post("/v1/chat/completions", json=HELLO | body), status)
    assert len(error["message"]) <= 1001
    assert len(error["param"] or "") <= 201
    assert "x" * 101 not in error["message"]


async def test_a_slash_at_the_end_of_a_path_changes_nothing(app: App) -> None:
    assert (await app.http.post("/v1/chat/completions/", json=HELLO)).status_code == 200
    assert (await app.http.get("/v1/models//")).status_code == 200


async def test_options_lists_the_methods_of_a_path(app: App) -> None:
    answer = await app.http.options("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (204, "POST, OPTIONS", b"")
    assert error_of(await app.http.options("/nowhere"), 404)["code"] == "unknown_url"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("options", [{}, {"stream": True}, {"top_k": "wrong"}, {"model": "other"}])
async def test_no_text_of_users_or_models_is_logged(app: App, path: str, options: dict[str, Any]) -> None:
    app.script = Script("an answer of its own")
    body = {"model": MODEL, "input": "my words", "prompt": "my words", "max_tokens": 30}
    body |= {"messages": [{"role": "user", "content": "my words"}]}
    kept = {"input", "model"} if path == "/v1/responses" else body.keys()
    asked = {name: value for name, value in body.items() if name in kept} | options
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        await app.http.post(path, json=asked, headers={"x-request-id": "mine"})
    assert {entry["request_id"] for entry in logs if entry["event"] == "request"} == {"mine"}
    assert "my words" not in str(logs)
    assert "of its own" not in str(logs)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
async def test_options_that_look_misspelt_are_named(app: App, path: str) -> None:
    body = HELLO | {"prompt": "x", "input": "x", "max_tokens": 5}
    if path == "/v1/responses":
        body = {"model": MODEL, "input": "x"}
    harmless = {"user": "u", "metadata": {}, "stream": False, "models": [], "no_such_option": 1, "n" * 99: 1}
    with structlog.testing.capture_logs() as logs:
        answer = await app.http.post(path, json=body | harmless)
        assert answer.status_code == 200, answer.text
        assert "x-wisp-ignored" not in answer.headers
        assert [entry for entry in logs if entry["log_level"] == "warning"] == []
        answer = await app.http.post(path, json=body | harmless | {"temprature": 0, "Top-P": "secret"})
    assert answer.status_code == 200
    ignored = "temprature (did you mean temperature?), Top-P (did you mean top_p?)"
    assert answer.headers["x-wisp-ignored"] == ignored
    (entry,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert entry["options"] == {"temprature": "temperature", "Top-P": "top_p"}
    assert "secret" not in str(entry)
    stream = await app.http.post(path, json=body | {"stream": True, "temper\u00e4ture\n": 0})
    assert stream.headers["x-wisp-ignored"] == "temper\\xe4ture\\n (did you mean temperature?)"
    assert "x-wisp-ignored" not in (await app.http.post(path, json=body)).headers


async def test_an_unknown_model_is_refused(app: App) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = await app.http.post(path, json=HELLO | {"model": "gpt-9", "prompt": "x"})
        assert error_of(response, 404)["code"] == "model_not_found"
    assert error_of(await app.http.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"


async def test_models_are_listed(app: App) -> None:
    listed = (await app.http.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert (await app.http.get(f"/v1/models/{MODEL}")).json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == listed["data"][0]["context_window"] == CONTEXT
    capabilities = listed["data"][0]["capabilities"]
    assert {name for name, offered in capabilities.items() if offered} >= {"logprobs", "structured_output", "tools"}


async def test_readable_paths_answer_head_requests(app: App) -> None:
    for path in ("/health", "/ready", "/v1/models", f"/v1/models/{MODEL}", "/metrics"):
        assert (await app.http.head(path)).status_code == 200
    app.upstream.problems = {"verifier": "none"}
    assert (await app.http.head("/ready")).status_code == 503


class Pinging(httpx.AsyncBaseTransport):
    """A proxy that keeps streams alive with comments, between events and before the first one."""

    def __init__(self, gateway: httpx.AsyncBaseTransport) -> None:
        self._gateway = gateway

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._gateway.handle_async_request(request)
        body = await response.aread()
        pinged = b": ping\n\n" + body.replace(b"\n\n", b"\n\n: ping\n\n")
        return httpx.Response(response.status_code, headers=response.headers, content=pinged)


async def test_comments_of_a_proxy_do_not_break_the_official_client(app: App) -> None:
    proxy = httpx.AsyncClient(transport=Pinging(httpx.ASGITransport(app.asgi)))
    client = openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=0, http_client=proxy)
    text = ""
    async for chunk in await client.chat.completions.create(model=MODEL, messages=HELLO["messages"], stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == app.script.text
    await client.close()


@pytest.mark.parametrize(
    ("accept", "resumable", "has_ids"),
    [
        ("*/*", False, True),
        ("text/event-stream", False, True),
        ("application/json, text/event-stream;q=0.9", False, True),
        ("application/json", False, False),
        ("application/json", True, True),
    ],
)
async def test_events_have_ids_for_clients_that_may_use_them(
    app: App, accept: str, resumable: bool, has_ids: bool
) -> None:
    body = HELLO | {"stream": True, "wisp": {"resumable": resumable}}
    response = await app.http.post("/v1/chat/completions", json=body, headers={"accept": accept})
    *events, done = response.text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    assert {event.startswith("id: ") for event in events} == {has_ids}


async def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(app: App) -> None:
    text = "x" * (CONTEXT + 5)
    for path, body, tokens in (
        ("/v1/completions", {"prompt": text}, len(text)),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, len(text) + 19),
    ):
        error = error_of(await app.http.post(path, json={"model": MODEL} | body), 400)
        assert error["code"] == "context_length_exceeded"
        # litellm and LangChain know the error by these words.
        assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens. ")
        assert f"your {error['param']} resulted in {tokens} tokens" in error["message"]


async def test_a_crash_in_the_middle_of_a_stream_is_an_error_event(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Chunks, index: int, finish: str) -> Any:
        raise ZeroDivisionError("a defect")

    async def one_by_one(message: Message) -> None:
        assert isinstance(message, Generate)
        for result in results_of(message, app.script, app.tokenizer):
            asyncio.get_running_loop().call_later(0.01 * result.base_len, send, result)

    def send(result: Result) -> None:
        sending.append(asyncio.ensure_future(app.sessions.receive(result)))

    sending: list[Any] = []
    monkeypatch.setattr(Chunks, "closing", crash)
    app.services.draft = one_by_one
    response = await app.chat(stream=True)
    assert response.status_code == 200
    *events, error, done = response.text.strip().split("\n\n")
    assert len(events) > 1
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert done == "data: [DONE]"


@pytest.mark.parametrize("text", ["word " * 100_000, "x" * 40_000])
async def test_a_far_too_long_prompt_is_refused_without_tokenizing_it(
    app: App, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    encode = Tokenizer.encode

    def encode_and_measure(self: Tokenizer, text: str) -> list[int]:
        lengths.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", encode_and_measure)
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        response = await app.http.post(path, json={"model": MODEL} | body)
        error = error_of(response, 400)
        assert error["code"] == "context_length_exceeded"
        assert f"more than {2 * CONTEXT}" in error["message"]
    assert max(lengths) < 20_000
    assert sum(lengths) < 40_000


@pytest.mark.parametrize("echo", [True, False])
async def test_token_ids_outside_the_vocabulary_are_refused(app: App, echo: bool) -> None:
    for token in (-1, 259, 2**31, 2**63, 2**70):
        body = {"model": MODEL, "prompt": [5, token], "echo": echo}
        assert error_of(await app.http.post("/v1/completions", json=body), 400)["param"] == "prompt"
    body = {"model": MODEL, "prompt": ["fine", "x" * CONTEXT]}
    assert error_of(await app.http.post("/v1/completions", json=body), 400)["param"] == "prompt[1]"


async def test_an_empty_prompt_becomes_the_beginning_of_text_token(app: App) -> None:
    response = await app.http.post("/v1/completions", json={"model": MODEL, "prompt": ""})
    assert response.json()["usage"]["prompt_tokens"] == 1


async def test_too_many_completions_are_refused(app: App) -> None:
    assert error_of(await app.chat(n=100), 400)["param"] == "n"
    response = await app.http.post("/v1/completions", json={"model": MODEL, "prompt": ["x"] * 100})
    assert error_of(response, 400)["param"] == "n"


async def test_bad_headers_are_refused(app: App) -> None:
    for header, value in (
        ("x-slo-ttft-ms", "soon"),
        ("x-llm-d-slo-tpot-ms", "-1"),
        ("x-wisp-draft", "magic"),
        ("x-wisp-pool", "a.b"),
    ):
        response = await app.http.post("/v1/chat/completions", json=HELLO, headers={header: value})
        assert error_of(response, 400)["param"] == header


async def test_a_crash_is_a_500_with_openais_error_body(app: App) -> None:
    app.services.error = ZeroDivisionError("a defect")
    error = error_of(await app.chat(), 500)
    assert "defect" not in error["message"]


def test_the_peers_folder_has_one_token_per_byte(folder: ModelFolder) -> None:
    assert len(Tokenizer(folder).encode("a🙂")) == 5
    assert Path(folder.path).name == MODEL


async def test_the_gateways_limits_on_prompt_and_output_hold(folder: ModelFolder) -> None:
    app = App(folder, max_prompt_tokens=40, max_output_tokens=5)
    short = {"model": MODEL, "prompt": "Hi"}
    long = await app.http.post("/v1/completions", json=short | {"prompt": "x" * 41, "max_tokens": 5})
    assert error_of(long, 400)["code"] == "context_length_exceeded"
    assert (
        f"maximum context length is {CONTEXT} tokens, and prompts here may have 40 of"
        in long.json()["error"]["message"]
    )
    much = await app.http.post("/v1/completions", json=short | {"max_tokens": 6})
    assert error_of(much, 400)["param"] == "max_tokens"
    assert (await app.http.post("/v1/completions", json=short | {"max_tokens": 5})).status_code == 200
    assert (await app.http.post("/v1/completions", json=short)).status_code == 400  # OpenAI's default is 16
    await app.chat(messages=[{"role": "user", "content": ""}])
    assert [generate.max_tokens for generate in app.generated] == [5, 5]
    await app.http.aclose()


@pytest.mark.parametrize(("setting", "sampling"), [("auto", (0.6, 0.9, 20)), ("ignore", (1.0, 1.0, 0))])
async def test_requests_default_to_the_models_sampling(
    tmp_path: Path, setting: str, sampling: tuple[float, float, int]
) -> None:
    folder = tiny_target(tmp_path / MODEL)
    (folder.path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "top_k": 20}')
    app = App(ModelFolder(folder.path), generation_config=setting)
    assert (await app.chat(max_tokens=1)).status_code == 200
    assert (await app.chat(max_tokens=1, temperature=0)).status_code == 200
    named = [generate.sampling for generate in app.generated]
    assert (named[0].temperature, named[0].top_p, named[0].top_k) == sampling
    assert named[1].temperature == 0


async def test_texts_and_conversations_are_tokenized(app: App) -> None:
    made = (await app.http.post("/tokenize", json={"prompt": "ab", "return_token_strs": True})).json()
    ids = app.tokenizer.encode("ab")
    assert made == {"count": 2, "max_model_len": CONTEXT, "tokens": ids, "token_strs": ["a", "b"]}
    chat = (await app.http.post("/tokenize", json=HELLO)).json()
    assert chat["tokens"] == app.tokenizer.render_chat(HELLO["messages"])
    open_ = (await app.http.post("/tokenize", json=HELLO | {"add_generation_prompt": False})).json()
    assert chat["tokens"][: open_["count"]] == open_["tokens"] != chat["tokens"]
    assert (await app.http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "ab"}
    for path, body, status in (
        ("/detokenize", {"tokens": [10**6]}, 400),
        ("/detokenize", {"tokens": "x"}, 400),
        ("/detokenize", {"tokens": None}, 400),
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "model": "gpt-9"}, 404),
    ):
        error_of(await app.http.post(path, json=body), status)


async def test_an_answer_may_continue_the_last_message(app: App) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    answer = await app.chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert answer.status_code == 200
    assert app.tokenizer.decode(app.generated[-1].prompt).endswith("Well, ")
    with_prompt = await app.chat(messages=messages)
    assert with_prompt.json()["usage"]["prompt_tokens"] > answer.json()["usage"]["prompt_tokens"]


async def test_variables_that_the_template_lacks_are_refused(app: App) -> None:
    for options, param in (
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ):
        error = error_of(await app.chat(**options), 400)
        assert (error["code"], error["param"]) == ("unsupported_parameter", param)
