"""A short seeded chaos run, on a suite of its own with a tiny model: nothing lost, wrong or left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.tools.bench.support.tiny import tiny_model
from services.tools.chaos import report
from services.tools.chaos.client import Verdict
from services.tools.chaos.core.faults import Kind, schedule
from services.tools.chaos.core.requests import load
from services.tools.chaos.reference import References
from services.tools.chaos.run import Plan, run
from services.tools.local.progress import Progress

SEED = 5
KINDS = (
    Kind.KILL_VERIFIER,
    Kind.KILL_DRAFTER,
    Kind.KILL_GATEWAY,
    Kind.KILL_SCHEDULER,
    Kind.FREEZE_VERIFIER,
    Kind.DRAIN_VERIFIER,
    Kind.KILL_REDIS,
    Kind.CUT_LINK,
    Kind.DUPLICATES,
    Kind.LOST_ROUNDS,
    Kind.POISON,
)


@pytest.mark.timeout(400)  # longer than a client's patience, so that one that waits in vain is named, and the logs kept
async def test_nothing_is_lost_wrong_or_left_behind(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    asked = load(SEED, questions=8, longest=40)
    references = References(folder, asked.questions, 40)
    plan = Plan(
        target=folder,
        faults=schedule(SEED, len(KINDS), KINDS, longest_gap_s=0.3),
        load=asked,
        clients=8,
        lanes=3,
        env={"WISP_KV_HANDOFF": "drain"},
        env_of={"verifier": {"WISP_PROFILE": "false"}},
    )
    verdicts = await run(plan, references, Progress(), print)
    print(*report.notes(verdicts), sep="\n")
    assert verdicts.problems == [], f"the same again: wisp chaos --tiny --seed {SEED}"
    assert {hit.fault.kind for hit in verdicts.hits} == set(KINDS)
    assert verdicts.count(Verdict.RIGHT) > 20
    assert verdicts.sessions > 20
    assert verdicts.results > 100
    assert verdicts.poisoned > 0
