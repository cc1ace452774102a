"""`wisp top`: the state it derives from messages, its screen, and its choice of a suite."""

from __future__ import annotations

import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import builders
import pytest
from rich.console import Console

from services.tools.cli.core.suite_snapshot import SuiteSnapshot
from services.tools.cli.core.suite_view import short, suite_view
from services.tools.cli.core.suite_watch import SuiteWatch
from services.tools.cli.suite_address import SuiteAddress, baselines_here, choose_suite, suites_at
from services.tools.local.folder import RunFolder, RunningApi, RunningSuite, note_api, note_suite, running_suites
from shared.errors import SettingsError
from shared.messages import (
    Batch,
    ClassLoad,
    Ended,
    Heartbeat,
    Job,
    LearningState,
    LeftOut,
    Load,
    Result,
    Slo,
    Status,
    Verify,
)

SLO = Slo(ttft_ms=100, tpot_ms=50)


def heartbeat(verifier: str = "v1", **changed: Any) -> Heartbeat:
    return builders.heartbeat(verifier, {"a": 5}, **({"free_tokens": 750, "total_tokens": 1000} | changed))


def load(**changed: Any) -> Load:
    fields = {"queue_ms": 12.0, "pending": 3, "policy": "edf", "utilization": 0.5}
    return builders.load(1.5, **(fields | changed))


def job(session: str = "chatcmpl-abcdef0123456789", **changed: Any) -> Job:
    fields = {"drafted": 4, "queue_ms": 7.0, "slack_ms": 40.0, "reason": "due in 40 ms"}
    return builders.job(session, 2, 10, [1, 2], **(fields | changed))


def batch(name: str = "b1", jobs: list[Job] | None = None, **changed: Any) -> Batch:
    return builders.batch(name, *(jobs or [job()]), **({"predicted_ms": 40.0, "policy": "edf"} | changed))


def result(name: str = "b1", session: str = "a", round_: int = 0, **changed: Any) -> Result:
    fields = {"batch": name, "tokens": [1, 2, 3], "accepted": 2, "trimmed_to": 4, "verify_ms": 50.0}
    return builders.result(session, round_, 10, **(fields | changed))


def ended(reason: str = "stop", tokens: int = 100, **changed: Any) -> Ended:
    return builders.ended("a", reason, tokens=tokens, **changed)


def watched(*messages: tuple[float, object], started_ms: float = 0.0) -> SuiteWatch:
    watch = SuiteWatch(started_ms)
    for at_ms, message in messages:
        watch.feed(message, at_ms)  # type: ignore[arg-type]
    return watch


def text(snapshot: SuiteSnapshot, note: str | None = None, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, no_color=True)
    console.print(suite_view(snapshot, "ns", note))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_verifier_is_alive_silent_and_forgotten() -> None:
    watch = watched((1000, heartbeat()), (1000, heartbeat("v2", draining=True)))
    one, two = watch.snapshot(1500).verifiers
    assert (one.name, one.alive, one.draining, one.cache_used, one.sessions) == ("v1", True, False, 0.25, 1)
    assert two.draining
    one, _ = watch.snapshot(4000).verifiers
    assert (one.alive, one.silent_ms) == (False, 3000)
    assert watch.snapshot(61_001).verifiers == []


def test_a_mixed_fleet_is_shown_by_arithmetic() -> None:
    beats = [heartbeat("v1", arithmetic="wisp-1"), heartbeat("v2"), heartbeat("v3", arithmetic="wisp-1")]
    watch = watched(*((0, beat) for beat in beats))
    assert [one.arithmetic for one in watch.snapshot(1).verifiers] == ["wisp-1", "", "wisp-1"]
    assert watch.snapshot(1).mixture == {}
    assert "mixed" not in text(watch.snapshot(1))
    watch.feed(heartbeat("v4", arithmetic="torch 2.13, cpu AVX2"), 1)
    assert watch.snapshot(1).mixture == {"wisp-1": ["v1", "v3"], "torch 2.13, cpu AVX2": ["v4"]}
    screen = text(watch.snapshot(1))
    assert "mixed fleet: sessions stay with verifiers of one arithmetic" in screen
    assert "  v1, v3: wisp-1" in screen
    assert "  v4: torch 2.13, cpu AVX2" in screen
    for at_ms in (1000, 2500):
        watch.feed(heartbeat("v4", arithmetic="torch 2.13, cpu AVX2"), at_ms)
    assert watch.snapshot(2600).mixture == {}, "the others are silent"


def test_a_pool_shows_what_its_drafts_have_learned() -> None:
    states = [LearningState(version=v, acceptance=a, shipped_acceptance=0.4) for v, a in ((0, 0.4), (3, 0.6))]
    beats = [builders.drafter_heartbeat(f"d{i}", learning=state) for i, state in enumerate(states)]
    waiting = watched((0, heartbeat()), (0, beats[0]), (0, builders.drafter_heartbeat("d9")))
    assert "drafts learning (shipped: 40% accepted)" in text(waiting.snapshot(1))
    both = watched((0, heartbeat()), *((0, beat) for beat in beats)).snapshot(1)
    (pool,) = both.pools
    assert (pool.learned, pool.learned_acceptance, pool.shipped_acceptance) == (1, 0.5, 0.4)
    assert "1 learned: 50% accepted, shipped 40%" in text(both)
    assert "learn" not in text(watched((0, heartbeat()), (0, builders.drafter_heartbeat("d9"))).snapshot(1))


def test_a_pool_shows_its_drafters_and_the_sessions_without() -> None:
    stand_in = builders.drafter_heartbeat("s1.pool", sessions=3, drafts=False)
    watch = watched((0, heartbeat()), (0, stand_in), (0, builders.drafter_heartbeat("s2.pool", drafts=False)))
    assert watch.snapshot(1).without_drafters == ["pool"]
    assert "default pool: no drafter, a scheduler stands in for 3 sessions" in text(watch.snapshot(1))
    watch.feed(builders.drafter_heartbeat("d1", sessions=64), 1)
    watch.feed(builders.drafter_heartbeat("d2", sessions=60), 1)
    assert watch.snapshot(1).without_drafters == []
    screen = text(watch.snapshot(1), width=120)
    assert "default pool: 2 drafters, 124 sessions; a scheduler stands in for 3 sessions until" in screen
    watch.feed(stand_in, 3500)
    assert watch.snapshot(3500).without_drafters == ["pool"], "the drafters are silent"


def test_without_batches_the_observed_time_is_named() -> None:
    watch = watched((0, heartbeat()))
    assert "no batch in 5 s" in text(watch.snapshot(5000))
    watch.feed(heartbeat(), 80_000)
    assert "no batch in 60 s" in text(watch.snapshot(80_000))


def test_batches_are_held_against_their_prediction() -> None:
    watch = watched((0, heartbeat()))
    for i, took in enumerate((50.0, 20.0, 60.0)):
        watch.feed(batch(f"b{i}", [job("a"), job("b")]), 1000.0 * i)
        watch.feed(result(f"b{i}", "a", i, verify_ms=took), 1000.0 * i + 100)
        watch.feed(result(f"b{i}", "b", i, verify_ms=took), 1000.0 * i + 100)
    watch.feed(batch("next"), 2500)
    watch.feed(
        builders.cost_model(coefficients=[1.0] * 5, samples=7),
        2600,
    )
    (verifier,) = watch.snapshot(4000).verifiers
    assert verifier.ratio_p50 == pytest.approx(50 / 40)
    assert (verifier.predicted_ms, verifier.measured_ms, verifier.batch_jobs, verifier.samples) == (40, 60, 2, 7)
    assert verifier.jobs_per_s == pytest.approx(6 / 4), "six jobs in the four seconds that were seen"


def test_tokens_per_second_count_each_committed_round_once() -> None:
    watch = watched(
        (0, result(round_=0)),
        (100, result(round_=0)),
        (200, result(round_=1, status=Status.CONFLICT)),
        (300, result(round_=2, status=Status.PREFILLED, tokens=[])),
        (25_000, result(round_=3, tokens=[5], accepted=0, trimmed_to=2)),
    )
    seen = watch.snapshot(30_000)
    assert (seen.throughput.short, seen.throughput.long) == (1 / 10, 4 / 30)
    assert (seen.verified, seen.accepted, seen.acceptance) == (6, 2, 2 / 6)
    later = watch.snapshot(60_500)
    assert (later.throughput.short, later.throughput.long) == (0, 1 / 60)
    watch.feed(result(round_=0), 70_000)
    assert watch.snapshot(70_000).throughput.long == 4 / 60, "forgotten rounds are not remembered for ever"


def test_goodput_and_attainment_count_finished_sessions() -> None:
    watch = watched(
        (1000, ended(service_class="fast", slo=SLO)),
        (1000, ended("length", attained=False, service_class="fast", slo=SLO)),
        (1000, ended("abort", attained=False, tokens=9, service_class="fast")),
        (1000, ended("refused", code="overloaded", attained=False, tokens=0, service_class="fast")),
        (1000, ended("refused", attained=False, tokens=0, service_class="slow")),
        (1000, ended(service_class="fast", tokens=0)),
        (1000, ended(service_class="free", tokens=0)),
        (1000, load(classes=[ClassLoad(service_class="idle", sessions=2, waiting=1, queue_ms=5.0, slack_ms=-3.0)])),
    )
    watch.feed(result(session="s", tokens=[1] * 40), 9000)
    seen = watch.snapshot(10_000)
    assert seen.throughput.short == 40 / 10
    assert seen.goodput.short == pytest.approx(40 / 10 * 100 / 209), "100 of the ended sessions' 209 tokens"
    views = {one.service_class: one for one in seen.classes}
    fast = views["fast"]
    assert (fast.ended, fast.promised, fast.attained, fast.attainment, fast.refused) == (3, 2, 1, 0.5, 1)
    free = views["free"]
    assert (free.ended, free.promised, free.attained, free.attainment) == (1, 0, 0, None), "best effort has no SLO"
    assert (views["slow"].ended, views["slow"].attainment, views["slow"].refused) == (0, None, 1)
    assert (views["idle"].sessions, views["idle"].waiting, views["idle"].slack_ms) == (2, 1, -3)
    assert [(e.service_class, e.reason, e.count) for e in seen.ends] == [
        ("fast", "abort", 1),
        ("fast", "length", 1),
        ("fast", "refused overloaded", 1),
        ("fast", "stop", 2),
        ("free", "stop", 1),
        ("slow", "refused", 1),
    ]
    assert watch.snapshot(62_000).ends == []


def test_goodput_is_never_above_throughput() -> None:
    """A session that ends just after the observation began has most of its tokens from before."""
    watch = watched((0, load()), (0, heartbeat()), (100, result(session="s", tokens=[1])), (200, ended(tokens=500)))
    seen = watch.snapshot(5000)
    assert (seen.throughput.short, seen.goodput.short) == (1 / 5, 1 / 5)
    later = watch.snapshot(12_000)
    assert later.goodput.short == 0
    assert later.goodput.long == later.throughput.long > 0


def test_a_short_observation_names_the_time_that_it_has_seen() -> None:
    watch = watched((0, load()), (0, heartbeat()), (100, result()), (100, ended()))
    screen = text(watch.snapshot(5000))
    assert "tokens/s in 5 s: 0.6; goodput 0.6; " in screen
    assert "ends in 5 s:" in screen
    watch.feed(heartbeat(), 25_000)
    watch.feed(load(), 25_000)
    assert "tokens/s in 10 and 25 s: 0.0, 0.1; goodput 0.0, 0.1; " in text(watch.snapshot(25_000))
    watch.feed(load(), 90_000)
    assert "tokens/s in 10 and 60 s: " in text(watch.snapshot(90_000))


def test_runs_are_counted_as_sessions_jobs_tokens_and_busy_time() -> None:
    watch = watched((0, load()), (0, heartbeat()), (1000, batch("b", [job("a"), job("b")])))
    for session in ("a", "b"):
        watch.feed(result("b", session, 0, tokens=[1], verify_ms=100.0, run_left=32), 1200)
    for step in range(5):
        for session in ("a", "b"):
            run = {"tokens": [1, 1], "run": True, "run_left": 30 - 2 * step, "accepted": 0, "trimmed_to": 0}
            watch.feed(result("run", session, 1 + step, verify_ms=100.0, **run), 1300 + 100 * step)
    watch.feed(batch("c", [job("c")]), 1700)
    watch.feed(result("c", "c", 0, tokens=[1], verify_ms=150.0), 1850)
    (verifier,) = watch.snapshot(2000).verifiers
    assert verifier.runs == 2
    assert verifier.jobs_per_s == pytest.approx((2 + 1 + 20) / 2)
    assert verifier.batch_jobs == (2 + 0 + 1 + 2) / 2
    assert verifier.busy == pytest.approx((1850 - 1100) / 2000), "steps that several results report count once"
    seen = watch.snapshot(2000)
    assert (seen.throughput.short, seen.run_tokens) == (23 / 2, 20)
    screen = text(seen, width=120)
    assert "batch of 1 beside 2 in runs on v1" in screen
    assert " 38% " in screen
    before = watch.snapshot(2000)
    watch.feed(result("run", "a", 6, tokens=[1, 2, 3], run=True, run_left=0, copied=[0, 1], trimmed_to=4), 2100)
    seen = watch.snapshot(2100)
    assert (seen.verified - before.verified, seen.accepted - before.accepted) == (0, 0), "copies are no drafts"
    watch.feed(builders.ended("b"), 2100)
    assert watch.snapshot(2100).verifiers[0].runs == 0
    watch.feed(result("c", "d", 0, run_left=9), 2200)
    assert watch.snapshot(2200).verifiers[0].runs == 1
    watch.feed(heartbeat(), 8000)
    assert watch.snapshot(8000).verifiers[0].runs == 0, "it fell silent"


def test_the_latest_batches_say_why() -> None:
    left = [LeftOut(session="chatcmpl-ffffffffffff", reason="not its turn")]
    watch = watched((0, load()), (0, heartbeat()))
    for i in range(9):
        watch.feed(batch(f"b{i}", [job(reason=f"reason {i}")], waiting=4, left_out=left), 100.0 * i)
    batches = watch.snapshot(1000).batches
    assert [one.batch for one in batches] == ["b8", "b7", "b6", "b5", "b4"]
    assert (batches[0].verifier, batches[0].measured_ms, batches[0].age_ms) == (None, None, 200)
    shown = text(watch.snapshot(1000), width=200)
    assert "abcdef01 default, draft 2 of 4, queued 7 ms: reason 8 (slack 40 ms)" in shown
    assert "left out ffffffff: not its turn" in shown
    assert "and 3 more left out" in shown
    watch.feed(batch("chunk", [job(prefill_to=128)]), 1000)
    assert "prompt to 128" in text(watch.snapshot(1000), width=200)


@pytest.mark.parametrize("width", [80, 200])
def test_the_screen_fits_its_width(width: int) -> None:
    verifier = "x" * 60 + "-v1"
    watch = watched((0, load(policy="wisp+")), (0, heartbeat(verifier)), (0, ended("stop" * 20, slo=SLO)))
    watch.feed(batch("b", [job("s" * 128, reason="r" * 300)] * 9, left_out=[LeftOut(session="s", reason="w" * 300)]), 0)
    watch.feed(result("b", verifier=verifier), 50)
    lines = text(watch.snapshot(100), "note", width).splitlines()
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    for word in ("wisp+", "50%", "1.50 ms/token", "note", "and 3 more jobs", "25%", "50/40", "1/1", "x-v1 "):
        assert word in shown


def test_no_suite_a_silent_scheduler_and_an_inactive_one_differ() -> None:
    watch = watched((0, Verify.model_validate({**VERIFY})))
    assert watch.snapshot(5000).empty, "rounds alone are no suite"
    assert "No message from a scheduler or verifier in namespace ns for 5 s" in text(watch.snapshot(5000))
    watch.feed(heartbeat(), 5000)
    assert "no round yet" in text(watch.snapshot(5000))
    watch.feed(load(), 5000)
    assert "policy edf" in text(watch.snapshot(6000))
    assert "scheduler s1 silent for 9 s" in text(watch.snapshot(14_000))


VERIFY = {
    "session": "a",
    "round": 0,
    "base_len": 1,
    "draft": [],
    "acceptance": [],
    "drafter": "d",
    "gateway": "g",
    "fingerprint": "f",
}


def test_foreign_text_cannot_control_the_terminal() -> None:
    watch = watched((0, heartbeat()), (0, batch("b", [job(reason="\x1b[2J[bold]boo")])))
    shown = text(watch.snapshot(100), width=200)
    assert "\x1b" not in shown
    assert "[2J[bold]boo" in shown, "nor is it taken for markup"


def test_a_snapshot_is_json() -> None:
    watch = watched((0, load()), (0, heartbeat()), (0, batch()), (10, result()), (20, ended()))
    plain = json.loads(json.dumps(asdict(watch.snapshot(1000))))
    assert plain["verifiers"][0]["measured_ms"] == 50
    assert plain["batches"][0]["jobs"][0]["reason"] == "due in 40 ms"


def test_short_names_of_a_requests_texts_stay_different() -> None:
    assert short("chatcmpl-0123456789abcdef.3") == "01234567.3"
    assert short("plain") == "plain"


def test_given_values_win_and_the_latest_matching_suite_adds_the_rest() -> None:
    new, old = RunningSuite("up-new", "amqp://new/"), RunningSuite("up-old", "amqp://old/")
    assert choose_suite(None, None, [new]) == SuiteAddress("amqp://new/", "up-new")
    both = choose_suite(None, None, [new, old])
    assert (both.namespace, both.note) == ("up-new", "other suites on this machine (--namespace): up-old")
    assert choose_suite(None, "up-old", [new, old]) == SuiteAddress("amqp://old/", "up-old")
    assert choose_suite("amqp://else/", "prod", [new, old]) == SuiteAddress("amqp://else/", "prod")
    assert choose_suite("amqp://else/", None, [RunningSuite("up-x", None), new]) == SuiteAddress("amqp://else/", "up-x")
    default = "amqp://guest:guest@127.0.0.1:5672/"
    nothing = SuiteAddress(default, "wisp", absent="no suite runs on this machine")
    assert choose_suite(None, None, []) == nothing
    absent = "no suite nosuch runs on this machine, but up-new, up-old"
    assert choose_suite(None, "nosuch", [new, old]) == SuiteAddress(default, "nosuch", absent=absent)
    with pytest.raises(SettingsError, match="WISP_AMQP_URL"):
        choose_suite(None, None, [RunningSuite("up-x", None)])
    with pytest.raises(SettingsError, match="amqps"):
        choose_suite("http://somewhere/", None, [])
    with pytest.raises(SettingsError, match="namespace"):
        choose_suite(None, "a b", [])


def test_a_suite_is_named_by_the_url_of_its_api(tmp_path: Path) -> None:
    with RunFolder("up", tmp_path) as first, RunFolder("up", tmp_path) as second, RunFolder("bench", tmp_path) as third:
        note_suite(first.path, one := RunningSuite("one", "amqp://one/"))
        note_api(first.path, RunningApi("http://127.0.0.1:8000/v1", 1))
        note_suite(second.path, two := RunningSuite("two", "amqp://two/"))
        note_api(second.path, RunningApi("http://127.0.0.1:8001/v1", 2))
        note_suite(third.path, RunningSuite("three", "amqp://three/"))
        assert suites_at("http://127.0.0.1:8000/v1", tmp_path) == [one]
        assert suites_at("http://localhost:8001/v1/", tmp_path) == [two]
        assert suites_at("http://127.0.0.1:8001", tmp_path) == [two], "the page's address names it too"
        with pytest.raises(SettingsError, match=r"serves http://127.0.0.1:8002/v1 \(suites here: http.*--amqp-url"):
            suites_at("http://127.0.0.1:8002/v1", tmp_path)


def test_a_baseline_has_no_fleet_to_watch(tmp_path: Path) -> None:
    with RunFolder("up", tmp_path) as baseline:
        note_api(baseline.path, RunningApi("http://127.0.0.1:8000/v1", 1))
        assert baselines_here(tmp_path) == ["http://127.0.0.1:8000/v1"]
        with pytest.raises(SettingsError, match=r"8000/v1 is a baseline.*nothing to watch; .*http://.*:8000/metrics"):
            suites_at("http://127.0.0.1:8000/v1", tmp_path)
        absent = choose_suite(None, None, running_suites(tmp_path), baselines_here(tmp_path)).absent
        assert absent is not None
        assert absent.startswith("no suite runs on this machine (http://127.0.0.1:8000/v1 is a baseline")


def test_running_suites_are_those_whose_owner_lives(tmp_path: Path) -> None:
    folder = RunFolder("one", tmp_path)
    note_suite(folder.path, RunningSuite("one", "amqp://here/"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "suite.json").write_text("{")
    assert running_suites(tmp_path) == [RunningSuite("one", "amqp://here/")]
    folder.close(keep=True)
    assert (folder.path / "suite.json").is_file()
    assert running_suites(tmp_path) == []
