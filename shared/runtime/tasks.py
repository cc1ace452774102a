"""The end of asyncio's tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


async def cancel(tasks: Iterable[asyncio.Future[Any]], again_s: float) -> None:
    """Cancel tasks, and again every `again_s` seconds, until each has ended, however it does.

    Until Python 3.12, a cancellation is lost that meets the end of what `asyncio.wait_for` waits for, as each message
    that is published does. What was cancelled once would then go on for ever.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=again_s)
