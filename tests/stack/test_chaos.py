"""A short chaos run with a fixed seed, on its own suite with a tiny model: nothing is lost, wrong or left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.tools.bench.support.tiny import tiny_model
from services.tools.chaos.core import report
from services.tools.chaos.core.faults import FaultKind, schedule
from services.tools.chaos.core.requests import load
from services.tools.chaos.core.verdicts import RequestVerdict
from services.tools.chaos.reference import References
from services.tools.chaos.run import ChaosPlan, run
from services.tools.local.progress import Progress

SEED = 5
KINDS = (
    FaultKind.KILL_VERIFIER,
    FaultKind.KILL_DRAFTER,
    FaultKind.KILL_GATEWAY,
    FaultKind.KILL_SCHEDULER,
    FaultKind.FREEZE_VERIFIER,
    FaultKind.DRAIN_VERIFIER,
    FaultKind.KILL_REDIS,
    FaultKind.CUT_LINK,
    FaultKind.DUPLICATES,
    FaultKind.LOST_ROUNDS,
    FaultKind.POISON,
)


@pytest.mark.timeout(400)  # longer than a client's patience, so that a lost request is named and logs are kept
async def test_nothing_is_lost_wrong_or_left_behind(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    requests = load(SEED, questions=8, longest=40)
    references = References(folder, requests.questions, 40)
    plan = ChaosPlan(
        target=folder,
        faults=schedule(SEED, len(KINDS), KINDS, longest_gap_s=0.3),
        load=requests,
        clients=8,
        lanes=3,
        env={"WISP_KV_HANDOFF": "drain"},
        env_of={"verifier": {"WISP_PROFILE": "false"}},
    )
    result = await run(plan, references, Progress(), print)
    print(*report.notes(result), sep="\n")
    assert result.problems == [], f"repeat it with: wisp chaos --tiny --seed {SEED}"
    assert {one.fault.kind for one in result.faults} == set(KINDS)
    assert result.count(RequestVerdict.RIGHT) > 20
    assert result.sessions > 20
    assert result.results > 100
    assert result.run_results > 10, "the faults meet runs"
    assert result.poisoned > 0
