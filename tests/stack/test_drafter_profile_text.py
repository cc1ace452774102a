"""Sessions on emulated hardware with a bad link get the same text."""

from __future__ import annotations

from pathlib import Path

from asking import Case, Client, Traffic

from services.tools.local.stack import Stack

PROFILE = """
[draft]
step_ms = 5
prompt_ms = 0.1
[uplink]
delay_ms = 3
jitter_ms = 4
[downlink]
delay_ms = 2
jitter_ms = 4
"""


async def test_the_text_is_the_same_and_drafts_take_the_emulated_time(
    stack: Stack, client: Client, cases: list[Case], traffic: Traffic, tmp_path: Path
) -> None:
    (tmp_path / "slow.toml").write_text(PROFILE)
    env = {
        "WISP_DEVICE_PROFILE": str(tmp_path / "slow.toml"),
        "WISP_PREPARED_OUTCOMES": "8",
        "WISP_CACHE_TOKENS": "4096",
    }
    before = stack.processes("drafter")
    (slow,) = await stack.start("drafter", 1, env=env)
    for process in before:
        await stack.stop(process)
    traffic.clear()
    try:
        answers = await client.ask_all(cases, "combined")
    finally:
        await stack.start("drafter", 2)
        await stack.stop(slow)
    assert answers == [case.tokens for case in cases]
    assert traffic.drafters == {slow.name}
    drafted = [round_ for round_ in traffic.rounds if round_.draft_ms]
    assert drafted
    assert min(round_.draft_ms for round_ in drafted) >= 5
