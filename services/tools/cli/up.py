"""`wisp up`: the suite or a baseline in the foreground."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from services.gateway.keys import KeyFile
from services.gateway.settings import refuse_open
from services.tools.local.folder import RunningApi, note_api, page_of, running_apis
from services.tools.local.ports import is_free
from services.tools.local.settings import LocalSettings
from services.tools.local.stack import Stack
from shared.errors import WispError


def require_port(host: str, port: int) -> None:
    """Raise WispError if the port is taken, and name the suite of this checkout that took it."""
    if not port or is_free(host, port):
        return
    other = f"choose another port: `make serve PORT={port + 1}` or `wisp up --port {port + 1}` (0 takes a free one)."
    for api in running_apis():
        if api.port == port:
            raise WispError(
                f"port {port} on {host} is in use by the suite that `wisp up` started here (process {api.pid}). "
                f"Use it: `wisp chat`, or any OpenAI client at {api.url}. Stop it: Ctrl-C in its terminal, or "
                f"`kill {api.pid}`. To run another one beside it, {other}"
            )
    raise WispError(f"port {port} on {host} is in use by another program; {other}")


def require_keys(host: str, given: Path | None) -> Path | None:
    """Return the file of API keys, if any. Raises WispError if the API would be open to a network without keys."""
    path = given or LocalSettings().api_keys_file
    try:
        refuse_open(host, path, LocalSettings().unsafe_serve_everybody)
    except ValueError as error:
        raise WispError(str(error)) from None
    if path is not None:
        KeyFile(path)
    return path.absolute() if path else None


async def up(stack: Stack, console: Console) -> None:
    """Print the stack's URL and report processes that end. Raises ServiceFailed when a service has none left.

    During this time the run's folder has the API's address, for other commands of this checkout.
    """
    note_api(stack.folder, RunningApi(stack.url, os.getpid()))
    console.print()
    what = f"model {stack.target.name}" + ("" if stack.serving == "wisp" else f", {stack.serving} serving")
    console.print(Text.assemble("Ready: ", (stack.url, "bold cyan"), f"  ({what})"), soft_wrap=True)
    console.print(Text.assemble("Playground: ", (page_of(stack.url), "cyan")), soft_wrap=True)
    keyed = "WISP_API_KEYS_FILE" in stack.env
    console.print(Text(f"  {curl(stack.url, stack.target.name, keyed)}", "dim"), soft_wrap=True)
    console.print(Text(f"Logs: {stack.folder}. Ctrl-C stops everything.", "dim"), soft_wrap=True)
    while True:
        failure = await stack.next_failure()
        if not stack.complete:
            raise failure
        console.print(Text.assemble(("warning: ", "bold yellow"), str(failure)), soft_wrap=True)


def curl(url: str, model: str, keyed: bool = False) -> str:
    """Return a command line that sends a request to this stack. It is greedy, so that its answer is always the same."""
    body = {
        "model": model,
        "stream": True,
        "temperature": 0,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    key = '-H "Authorization: Bearer $WISP_API_KEY" ' if keyed else ""
    return f"curl -N {url}/chat/completions {key}-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
