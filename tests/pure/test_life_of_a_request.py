"""The files of the gateway that a plain streamed chat crosses are those that the page names, and no others.

A plain request has no options, so it must not enter code for tools, grammars, log-probabilities, predictions,
reasoning, traces or API keys.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from gateway_app import App
from pages import ROOT

from shared.models.folder import ModelFolder

PAGE = ROOT / "services/LIFE_OF_A_REQUEST.md"
GATEWAY = ROOT / "services/gateway"
REPLACED = {"fleet.py", "server.py", "transport.py"}
"""Files in whose place the test has its own: the HTTP server, the transport and the services behind the gateway."""
MOST_FILES = 18


@contextmanager
def crossed_files() -> Iterator[set[str]]:
    """Collect the gateway's files whose functions are called during the context."""
    codes: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            codes.add(frame.f_code.co_filename)

    files: set[str] = set()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(before)
        files |= {Path(code).name for code in codes if Path(code).is_relative_to(GATEWAY)}


def files_on_the_page() -> set[str]:
    """Return the files of the page's sentence about a plain request."""
    sentence = r"A plain request crosses (\d+) files of `services/gateway` and its `core`: (.*?)\. A test"
    ((count, names),) = re.findall(sentence, PAGE.read_text("utf-8"), re.DOTALL)
    files = set(re.findall(r"`(\w+\.py)`", names))
    assert len(files) == int(count)
    return files


async def test_a_plain_request_crosses_the_files_on_the_page(folder: ModelFolder) -> None:
    app = App(folder)  # nothing watches its sessions meanwhile, however slow the machine is
    with crossed_files() as crossed:
        response = await app.chat(stream=True)
    assert response.text.endswith("data: [DONE]\n\n")
    assert crossed | REPLACED == files_on_the_page()
    assert len(files_on_the_page()) <= MOST_FILES
    await app.http.aclose()


async def test_an_option_of_a_request_crosses_its_own_file(folder: ModelFolder) -> None:
    app = App(folder)
    with crossed_files() as crossed:
        await app.chat(stream=True, logit_bias={"5": 1}, logprobs=True)
    assert {"rules.py", "logprobs.py"} <= crossed - files_on_the_page()
    await app.http.aclose()
