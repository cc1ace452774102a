"""`wisp up`: the suite, or a baseline, in the foreground."""

from __future__ import annotations

import json
import shlex

from rich.console import Console
from rich.text import Text

from services.cli.ports import is_free
from services.cli.stack import Stack
from shared.errors import WispError


def require_port(host: str, port: int) -> None:
    """Raises WispError if the port is taken."""
    if port and not is_free(host, port):
        raise WispError(
            f"port {port} on {host} is in use by another program. Choose another one: `make serve PORT={port + 1}` or "
            f"`wisp up --port {port + 1}` (0 takes any free one)."
        )


async def up(stack: Stack, console: Console) -> None:
    """Say how the stack is reached, and report what dies. Raises ServiceFailed when a service has no process left."""
    console.print()
    what = f"model {stack.target.name}" + ("" if stack.serving == "wisp" else f", {stack.serving} serving")
    console.print(Text.assemble("Ready: ", (stack.url, "bold cyan"), f"  ({what})"), soft_wrap=True)
    console.print(Text(f"  {curl(stack.url, stack.target.name)}", "dim"), soft_wrap=True)
    console.print(Text(f"Logs are in {stack.folder}. Ctrl-C stops everything.", "dim"), soft_wrap=True)
    while True:
        failure = await stack.next_failure()
        if not stack.complete:
            raise failure
        console.print(Text.assemble(("warning: ", "bold yellow"), str(failure)), soft_wrap=True)


def curl(url: str, model: str) -> str:
    """A command line that asks this stack something."""
    body = {
        "model": model,
        "stream": True,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    return f"curl -N {url}/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
