"""A client that wants its answer: asks again what was not accepted, and goes on with a stream that broke."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

from services.tools.chaos.core.requests import Manner, Request
from services.tools.chaos.reference import Reference, References

PATIENCE_S = 150.0
"""A request that gets nothing new for so long is lost."""
SILENCE_S = 12.0
"""A stream that may be left, and says nothing for so long, is asked for at another gateway."""
ANSWER_S = 75.0
"""How long anything else may say nothing."""
AGAIN_S = 0.3
SLOW_BYTES, SLOW_S = 256, 0.05
PASSING = frozenset({"shutting_down", "brokers_unavailable", "redis_unavailable", "no_drafter", "no_verifier"})
"""Error codes of what is away for now; with 429 and connections that break, the reasons to ask again."""


class Verdict(StrEnum):
    """What became of a request."""

    RIGHT = "right"
    LEFT = "left"
    """The client went away; what it had was right."""
    ERROR = "error"
    """It ended in an error of the API."""
    WRONG = "wrong"
    LOST = "lost"


@dataclass
class Outcome:
    """One request from its first try to its end. Times are seconds of `time.monotonic`."""

    request: Request
    started_s: float
    ended_s: float = 0.0
    verdict: Verdict = Verdict.LOST
    detail: str = ""
    code: str = ""
    """Of the error that ended it."""
    sessions: list[str] = field(default_factory=list)
    """Names that its tries had."""
    refused: int = 0
    """Tries that were not accepted."""
    resumed: int = 0
    """Times that a stream was gone on with."""
    longest_stall_s: float = 0.0
    """Longest time without anything new, the first token included."""

    @property
    def troubled(self) -> bool:
        """Whether the client noticed anything."""
        return self.refused > 0 or self.resumed > 0


@dataclass
class _Answer:
    """What has come of an answer."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    usage: int | None = None
    last_id: str | None = None
    events: int = 0


class Refused(Exception):
    """This try was not accepted, or broke off; the next one may be."""


class Ended(Exception):
    """The API ended the request in an error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Left(Exception):
    """The client went away."""


class Client:
    """Asks whichever gateway there is."""

    def __init__(self, model: str, urls: Callable[[], Sequence[str]], references: References) -> None:
        self._model = model
        self._urls = urls
        self._references = references

    async def ask(self, request: Request) -> Outcome:
        """See a request to its end, and judge it."""
        outcome = Outcome(request, time.monotonic())
        reference = self._references.of[request.question.number]
        answer = _Answer()
        progress = _Progress(outcome)
        tries = 0
        try:
            async with httpx.AsyncClient(timeout=httpx.Timeout(ANSWER_S, connect=3.0)) as http:
                while time.monotonic() - progress.seen_s < PATIENCE_S:
                    tries += 1
                    try:
                        await self._try(http, request, reference, answer, outcome, progress, tries)
                    except (Refused, httpx.TransportError) as error:
                        outcome.detail = f"{type(error).__name__}: {error}"
                        if answer.last_id is None:
                            outcome.refused += 1
                            answer = _Answer()
                        else:
                            outcome.resumed += 1
                        await asyncio.sleep(AGAIN_S)
                        continue
                    self._judge(outcome, reference, answer)
                    break
                else:
                    outcome.detail = f"nothing new for {PATIENCE_S:g} s; last: {outcome.detail}"
        except Left:
            outcome.verdict, outcome.detail = Verdict.LEFT, ""
            if answer.tokens != reference.tokens[: len(answer.tokens)]:
                outcome.verdict, outcome.detail = Verdict.WRONG, f"left with {answer.tokens} of {reference.tokens}"
        except Ended as error:
            outcome.verdict, outcome.detail, outcome.code = Verdict.ERROR, str(error), error.code
            if answer.tokens != reference.tokens[: len(answer.tokens)]:
                outcome.verdict, outcome.detail = Verdict.WRONG, f"{error}, after {answer.tokens}"
        progress.new()
        outcome.ended_s = time.monotonic()
        return outcome

    def _judge(self, outcome: Outcome, reference: Reference, answer: _Answer) -> None:
        tokens, finish = reference.shown(outcome.request.max_tokens)
        wanted = {"tokens": tokens, "finish": finish, "text": self._references.text(tokens), "usage": len(tokens)}
        got = {"tokens": answer.tokens, "finish": answer.finish, "text": answer.text, "usage": answer.usage}
        wrong = {name: (value, wanted[name]) for name, value in got.items() if value != wanted[name]}
        outcome.verdict = Verdict.WRONG if wrong else Verdict.RIGHT
        outcome.detail = "; ".join(f"{name}: {a!r}, not {b!r}" for name, (a, b) in wrong.items())

    async def _try(
        self,
        http: httpx.AsyncClient,
        request: Request,
        reference: Reference,
        answer: _Answer,
        outcome: Outcome,
        progress: _Progress,
        tries: int,
    ) -> None:
        """Ask once. Raises Refused, httpx.TransportError (ask again), Ended or Left."""
        urls = self._urls()
        if not urls:
            raise Refused("no gateway is there")
        url = urls[(int(request.gateway * len(urls)) + tries - 1) % len(urls)]
        path = f"{url}/chat/completions" if request.chat else f"{url}/completions"
        body = self._body(request, reference)
        if request.manner is Manner.WHOLE:
            got = await http.post(path, json=body)
            fields = _checked(got.status_code, got.content)
            choice = fields["choices"][0]
            outcome.sessions.append(fields["id"])
            answer.tokens = [token["id"] for token in fields["wisp"]["tokens"]]
            answer.text = choice["message"]["content"] if request.chat else choice["text"]
            answer.finish, answer.usage = choice["finish_reason"], fields["usage"]["completion_tokens"]
            return
        headers = {} if answer.last_id is None else {"last-event-id": answer.last_id}
        silence_s = SILENCE_S if request.resumable and answer.last_id is not None else ANSWER_S
        timeout = httpx.Timeout(silence_s, connect=3.0)
        async with http.stream("POST", path, json=body, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                _checked(response.status_code, await response.aread())
            async for event_id, data in _events(_parts(response, request.manner, lambda: answer.last_id is not None)):
                if data == "[DONE]":
                    return
                fields = json.loads(data)
                if "error" in fields:
                    _raise(fields["error"])
                progress.new()
                answer.events += 1
                if fields["id"] not in outcome.sessions:
                    outcome.sessions.append(fields["id"])
                _take(answer, fields, request.chat)
                answer.last_id = event_id
                if request.manner is Manner.LEAVES and answer.events >= request.leaves_after:
                    raise Left
        raise Refused("the stream ended without its last event")

    def _body(self, request: Request, reference: Reference) -> dict[str, Any]:
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


class _Progress:
    """When something new came last."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self.seen_s = outcome.started_s

    def new(self) -> None:
        now = time.monotonic()
        self._outcome.longest_stall_s = max(self._outcome.longest_stall_s, now - self.seen_s)
        self.seen_s = now


def _take(answer: _Answer, fields: dict[str, Any], chat: bool) -> None:
    if (usage := fields.get("usage")) is not None:
        answer.usage = usage["completion_tokens"]
    for choice in fields["choices"]:
        answer.text += choice["delta"].get("content", "") if chat else choice["text"]
        answer.finish = choice["finish_reason"] or answer.finish
    answer.tokens += [token["id"] for token in fields.get("wisp", {}).get("tokens", ())]


def _checked(status: int, body: bytes) -> Any:
    try:
        fields = json.loads(body)
    except ValueError:
        raise Ended("not JSON", f"status {status}, body {body[:200]!r}") from None
    if status != 200:
        error = fields["error"]
        if status == 429:
            raise Refused(f"{status} {error}")
        _raise(error)
    return fields


def _raise(error: dict[str, Any]) -> None:
    code = str(error.get("code"))
    raise Refused(code) if code in PASSING else Ended(code, str(error.get("message")))


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
    """Id and data of each server-sent event."""
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
