"""A client that retries refused requests and resumes broken streams until its answer is complete."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from services.tools.chaos.core.requests import ChaosRequest, Manner
from services.tools.chaos.core.verdicts import RequestOutcome, RequestVerdict
from services.tools.chaos.reference import Reference, References

PATIENCE_S = 150.0
"""A request without new tokens for this long is lost."""
SILENCE_S = 12.0
"""A resumable stream that is silent for this long is resumed at another gateway."""
ANSWER_S = 75.0
"""Longest silence of any other response."""
CONNECT_S = 3.0
RETRY_S = 0.3
SLOW_BYTES, SLOW_S = 256, 0.05
"""A slow reader takes this many bytes, then pauses for this long."""
TRANSIENT_CODES = frozenset({"shutting_down", "brokers_unavailable", "redis_unavailable", "no_drafter", "no_verifier"})
"""Error codes after which the client retries, as after status 429 and broken connections."""


@dataclass
class _Answer:
    """The part of an answer that has arrived."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    usage: int | None = None
    last_id: str | None = None
    events: int = 0

    def take_event(self, fields: dict[str, Any], chat: bool) -> None:
        """Add an event of a stream."""
        self.events += 1
        if (usage := fields.get("usage")) is not None:
            self.usage = usage["completion_tokens"]
        for choice in fields["choices"]:
            self.text += choice["delta"].get("content", "") if chat else choice["text"]
            self.finish = choice["finish_reason"] or self.finish
        self.tokens += [token["id"] for token in fields.get("wisp", {}).get("tokens", ())]

    def take_whole(self, fields: dict[str, Any], chat: bool) -> None:
        """Add an answer that is not streamed."""
        choice = fields["choices"][0]
        self.tokens = [token["id"] for token in fields["wisp"]["tokens"]]
        self.text = choice["message"]["content"] if chat else choice["text"]
        self.finish, self.usage = choice["finish_reason"], fields["usage"]["completion_tokens"]


class TryAgain(Exception):
    """The attempt was not accepted or broke off; another one may succeed."""


class RequestFailed(Exception):
    """The API ended the request with an error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class ClientLeft(Exception):
    """The client disconnected on purpose."""


class ChaosClient:
    """Sends requests to any gateway that is up, and compares the answers with the references."""

    def __init__(self, model: str, urls: Callable[[], Sequence[str]], references: References) -> None:
        """urls: returns the base URLs of the gateways that are up."""
        self._model = model
        self._urls = urls
        self._references = references

    async def ask(self, request: ChaosRequest) -> RequestOutcome:
        """Send a request, retry and resume until it ends, and judge the answer."""
        outcome = RequestOutcome(request, time.monotonic())
        reference = self._references.of[request.question.number]
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        async with httpx.AsyncClient(timeout=timeout) as http:
            attempts = _Attempts(http, request, self._body(request, reference), outcome)
            try:
                if await attempts.until_complete(self._urls):
                    self._judge(outcome, reference, attempts.answer)
            except ClientLeft:
                outcome.verdict, outcome.detail = RequestVerdict.LEFT, ""
                _check_beginning(outcome, reference, attempts.answer, "left")
            except RequestFailed as error:
                outcome.verdict, outcome.detail, outcome.code = RequestVerdict.ERROR, str(error), error.code
                _check_beginning(outcome, reference, attempts.answer, str(error))
        attempts.progressed()
        outcome.ended_s = time.monotonic()
        return outcome

    def _judge(self, outcome: RequestOutcome, reference: Reference, answer: _Answer) -> None:
        """Compare a complete answer with the reference."""
        tokens, finish = reference.shown(outcome.request.max_tokens)
        wanted = {"tokens": tokens, "finish": finish, "text": self._references.text(tokens), "usage": len(tokens)}
        got = {"tokens": answer.tokens, "finish": answer.finish, "text": answer.text, "usage": answer.usage}
        wrong = {name: (value, wanted[name]) for name, value in got.items() if value != wanted[name]}
        outcome.verdict = RequestVerdict.WRONG if wrong else RequestVerdict.RIGHT
        outcome.detail = "; ".join(f"{name}: {a!r}, not {b!r}" for name, (a, b) in wrong.items())

    def _body(self, request: ChaosRequest, reference: Reference) -> dict[str, Any]:
        question = request.question
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_tokens,
            **question.sampling.model_dump(),
            "wisp": {"trace": True, "draft": request.draft, "resumable": request.resumable},
        }
        if request.manner is not Manner.WHOLE:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if request.chat:
            return body | {"messages": [{"role": "user", "content": question.prompt}]}
        return body | {"prompt": reference.prompt}


def _check_beginning(outcome: RequestOutcome, reference: Reference, answer: _Answer, ending: str) -> None:
    """Judge a request wrong if its tokens, up to its early end, are not the beginning of the reference."""
    if answer.tokens != reference.tokens[: len(answer.tokens)]:
        outcome.verdict = RequestVerdict.WRONG
        outcome.detail = f"{ending}, with {answer.tokens} of {reference.tokens}"


class _Attempts:
    """The attempts at one request, and the part of the answer that has arrived."""

    def __init__(
        self, http: httpx.AsyncClient, request: ChaosRequest, body: dict[str, Any], outcome: RequestOutcome
    ) -> None:
        self.answer = _Answer()
        self._http = http
        self._request = request
        self._body = body
        self._outcome = outcome
        self._progress_s = outcome.started_s

    def progressed(self) -> None:
        """Record that something new has arrived."""
        now_s = time.monotonic()
        self._outcome.longest_stall_s = max(self._outcome.longest_stall_s, now_s - self._progress_s)
        self._progress_s = now_s

    async def until_complete(self, urls: Callable[[], Sequence[str]]) -> bool:
        """Try until the answer is complete; return False when no new part arrives for `PATIENCE_S`.

        Raises RequestFailed or ClientLeft.
        """
        count = 0
        while time.monotonic() - self._progress_s < PATIENCE_S:
            try:
                await self._attempt(urls(), count)
                return True
            except (TryAgain, httpx.TransportError) as error:
                self._outcome.detail = f"{type(error).__name__}: {error}"
                if self.answer.last_id is None:
                    self._outcome.refused += 1
                    self.answer = _Answer()
                else:
                    self._outcome.resumed += 1
                await asyncio.sleep(RETRY_S)
            count += 1
        self._outcome.detail = f"nothing new for {PATIENCE_S:g} s; last: {self._outcome.detail}"
        return False

    async def _attempt(self, urls: Sequence[str], count: int) -> None:
        """Send the request once. Raises TryAgain, httpx.TransportError, RequestFailed or ClientLeft."""
        if not urls:
            raise TryAgain("no gateway is up")
        request = self._request
        url = urls[(int(request.gateway * len(urls)) + count) % len(urls)]
        path = f"{url}/chat/completions" if request.chat else f"{url}/completions"
        if request.manner is Manner.WHOLE:
            response = await self._http.post(path, json=self._body)
            fields = _checked(response.status_code, response.content)
            self._outcome.session_ids.append(fields["id"])
            self.answer.take_whole(fields, request.chat)
        else:
            await self._stream(path)

    async def _stream(self, path: str) -> None:
        request, answer = self._request, self.answer
        headers = {} if answer.last_id is None else {"last-event-id": answer.last_id}
        silence_s = SILENCE_S if request.resumable and answer.last_id is not None else ANSWER_S
        timeout = httpx.Timeout(silence_s, connect=CONNECT_S)
        async with self._http.stream("POST", path, json=self._body, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                _checked(response.status_code, await response.aread())
            parts = _parts(response, request.manner, lambda: answer.last_id is not None)
            async for event_id, data in _events(parts):
                if data == "[DONE]":
                    return
                fields = json.loads(data)
                if "error" in fields:
                    _raise(fields["error"])
                self.progressed()
                if fields["id"] not in self._outcome.session_ids:
                    self._outcome.session_ids.append(fields["id"])
                answer.take_event(fields, request.chat)
                answer.last_id = event_id
                if request.manner is Manner.LEAVES and answer.events >= request.leaves_after:
                    raise ClientLeft
        raise TryAgain("the stream ended without its last event")


def _checked(status: int, body: bytes) -> Any:
    """Return the JSON of an answer with status 200. Raises TryAgain or RequestFailed."""
    try:
        fields = json.loads(body)
    except ValueError:
        raise RequestFailed("not JSON", f"status {status}, body {body[:200]!r}") from None
    if status != 200:
        error = fields["error"]
        if status == 429:
            raise TryAgain(f"{status} {error}")
        _raise(error)
    return fields


def _raise(error: dict[str, Any]) -> None:
    code = str(error.get("code"))
    raise TryAgain(code) if code in TRANSIENT_CODES else RequestFailed(code, str(error.get("message")))


async def _parts(response: httpx.Response, manner: Manner, begun: Callable[[], bool]) -> AsyncIterator[bytes]:
    if manner is not Manner.SLOW:
        async for part in response.aiter_raw():
            yield part
        return
    async for part in response.aiter_raw(SLOW_BYTES):
        yield part
        if begun():
            await asyncio.sleep(SLOW_S)


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[tuple[str | None, str]]:
    """Yield id and data of each server-sent event."""
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n\n")
        for event in whole:
            event_id, data = None, ""
            for line in event.decode().split("\n"):
                name, _, value = line.partition(": ")
                if name == "id":
                    event_id = value
                elif name == "data":
                    data += value
            yield event_id, data
