"""Headless Chromium, driven over a pipe by its DevTools protocol: no driver and no package of its own."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from patience import HANG_S

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "about:blank",
)
ANSWER_S = HANG_S
KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "ArrowRight": (39, ""),
    "Home": (36, ""),
    "End": (35, ""),
}


def path() -> str | None:
    """Where Chromium is; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class PageFailed(AssertionError):
    """A script failed, or something did not appear."""


class BrowserPage:
    """One tab."""

    def __init__(self, writer: asyncio.StreamWriter | Any, log: list[dict[str, Any]]) -> None:
        self._writer = writer
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._session: str | None = None
        self.log = log
        """Errors of scripts, messages to the console, and requests, as events of the protocol."""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        self._number += 1
        number = self._number
        self._answers[number] = asyncio.get_running_loop().create_future()
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._writer.write(json.dumps(message).encode() + b"\0")
        try:
            answer = await asyncio.wait_for(self._answers[number], ANSWER_S)
        finally:
            del self._answers[number]
        if "error" in answer:
            raise PageFailed(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def take(self, message: dict[str, Any]) -> None:
        """Take in a message of the browser."""
        if (number := message.get("id")) in self._answers:
            if not self._answers[number].done():
                self._answers[number].set_result(message)
        elif message.get("method") in LOGGED:
            self.log.append(message)

    async def attach(self) -> None:
        """Attach to the first tab."""
        targets = await self.call("Target.getTargets")
        target = next(one["targetId"] for one in targets["targetInfos"] if one["type"] == "page")
        self._session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")

    async def open(self, url: str) -> None:
        """Load a page and wait until its scripts have run."""
        await self.call("Page.navigate", url=url)
        await self.wait("document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        """Return the value of an expression, awaited."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageFailed(f"{script}: {details.get('exception', details).get('description', details)}")
        return answer["result"].get("value")

    async def wait(self, condition: str, within_s: float = HANG_S) -> Any:
        """Wait until an expression is true, and return it."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    with suppress(PageFailed):  # between two pages there is no document
                        if value := await self.run(condition):
                            return value
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise PageFailed(
                f"never came true: {condition}\n{await self.run('document.body.innerText.slice(0, 1000)')}"
            ) from None

    async def text(self, selector: str) -> str:
        """Return the visible text of an element; empty where it is not seen."""
        found = f"document.querySelector({json.dumps(selector)})"
        return str(await self.run(f"{found} && {found}.checkVisibility() ? {found}.innerText : ''"))

    async def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        found = json.dumps(selector)
        await self.wait(f"document.querySelector({found}) !== null")
        box = await self.run(
            f"(() => {{ const one = document.querySelector({found}); one.scrollIntoView({{block: 'nearest'}});"
            "const box = one.getClientRects()[0] || one.getBoundingClientRect();"
            "return [box.left + box.width / 2, box.top + box.height / 2, box.width * box.height]; })()"
        )
        if not box[2]:
            raise PageFailed(f"{selector} cannot be seen")
        await self.click_at(box[0], box[1])

    async def click_at(self, x: float, y: float) -> None:
        """Click a place of the window."""
        await self.hover_at(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def hover_at(self, x: float, y: float) -> None:
        """Move the mouse."""
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def type(self, text: str) -> None:
        """Type into the element with the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        """Press and release a key."""
        code, text = KEYS[key]
        fields = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **fields)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    async def look(self, width: int, height: int, theme: str = "light", *, reduced_motion: bool = False) -> None:
        """Set the window's size, and what the reader prefers."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        features = [{"name": "prefers-color-scheme", "value": theme}]
        features.append({"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"})
        await self.call("Emulation.setEmulatedMedia", features=features)

    def problems(self) -> list[str]:
        """Return errors of scripts, messages to the console, and refusals of the policy for browsers."""
        found = []
        for event in self.log:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(str(details.get("exception", details).get("description", details)))
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(str([one.get("value", one.get("description")) for one in params["args"]]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["source"] != "network":
                found.append(str(params["entry"]["text"]))
        return found

    def requested(self) -> list[str]:
        """Return the addresses that the tab has requested."""
        return [
            event["params"]["request"]["url"] for event in self.log if event["method"] == "Network.requestWillBeSent"
        ]


def _pipe() -> tuple[int, int]:
    """Return a pipe whose descriptors are not those that Chromium reads and writes."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


LOGGED = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.requestWillBeSent")


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[BrowserPage]:
    """Run Chromium with its profile in `folder`, and give its tab."""
    program = path()
    assert program is not None
    to_browser, from_here = _pipe()
    from_browser, to_here = _pipe()
    flags = " ".join(FLAGS)
    process = await asyncio.create_subprocess_exec(
        "bash",  # dash takes descriptors of one digit only
        "-c",
        f'exec "$0" --user-data-dir="$1" {flags} 3<&{to_browser} 4>&{to_here}',
        program,
        str(folder),
        pass_fds=(to_browser, to_here),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "HOME": str(folder)},
    )
    os.close(to_browser)
    os.close(to_here)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 28)
    pipe = os.fdopen(from_browser, "rb", 0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    writing, _ = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(from_here, "wb", 0))
    page = BrowserPage(writing, [])

    async def receive() -> None:
        while True:
            page.take(json.loads((await reader.readuntil(b"\0"))[:-1]))

    receiving = asyncio.create_task(receive())
    try:
        await page.attach()
        yield page
    finally:
        with suppress(Exception):
            page._session = None
            await asyncio.wait_for(page.call("Browser.close"), 30)
        receiving.cancel()
        with suppress(asyncio.CancelledError, asyncio.IncompleteReadError):
            await receiving
        writing.close()
        transport.close()
        try:
            await asyncio.wait_for(process.wait(), 60)
        except TimeoutError:
            process.kill()
            await process.wait()
