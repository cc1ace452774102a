"""`wisp top` finds a running suite and shows its work."""

from __future__ import annotations

import asyncio
import json
import os
import sys

from asking import Case, Client

from services.tools.local.stack import Stack


async def test_a_suite_at_work(stack: Stack, client: Client, cases: list[Case]) -> None:
    env = {key: value for key, value in os.environ.items() if key not in ("WISP_AMQP_URL", "WISP_NAMESPACE")}
    if stack.brokers.given:  # then the run's folder does not say where they are
        env["WISP_AMQP_URL"] = stack.brokers.amqp_url
    top = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from services.tools.cli.main import app; app()",
        *("top", "--json", "--seconds", "6", "--namespace", stack.namespace),
        stdout=asyncio.subprocess.PIPE,
        env=env,
    )
    told = asyncio.create_task(top.communicate())
    while not told.done():
        await client.ask_all(cases[:6], "lookup")
    seen = json.loads((await told)[0])
    assert seen["namespace"] == stack.namespace
    assert {one["name"] for one in seen["verifiers"] if one["alive"]} == {
        process.name for process in stack.processes("verifier")
    }
    assert seen["scheduler"]["alive"]
    assert [(one["pool"], one["drafters"]) for one in seen["pools"]] == [("pool", 2)]
    assert seen["throughput"]["short"] > 0
    assert seen["verified"] > seen["accepted"] > 0
    batch = seen["batches"][0]
    assert batch["predicted_ms"] > 0
    assert batch["jobs"]
