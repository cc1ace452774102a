"""The record behind the fleet view: what it shows of the messages, what it hides, and that it stays small."""

from __future__ import annotations

import json

import builders

from services.gateway.core import fleet_record
from services.gateway.core.fleet_record import BATCHES_KEPT, RUNS_KEPT, FleetRecord, label
from shared.messages import ClassLoad, Finish, Message, Result, Slo, Status

SESSION = "chatcmpl-0123456789abcdef01234567"
SETTLED_MS = fleet_record.TOGETHER_MS + 1


def record(*messages: Message, at_ms: float = 1000.0) -> FleetRecord:
    made = FleetRecord(0.0)
    for message in messages:
        made.add(message, at_ms)
    return made


def verified(session: str = SESSION, **fields: object) -> Result:
    plain = {"accepted": 2, "trimmed_to": 3, "drafted": 4, "verify_ms": 20.0, "predicted_ms": 18.0}
    return builders.result(session, 5, 3, **({"tokens": [7, 8, 9]} | plain | fields))


def test_results_of_one_batch_become_one_batch() -> None:
    made = record(verified(), verified("cmpl-fedcba.1", status=Status.CONFLICT, drafted=0))
    assert made.news(0) == [], "more results may come"
    made.settle(1000.0 + SETTLED_MS)
    (batch,) = made.news(0)
    assert (batch["id"], batch["verifier"], batch["predicted_ms"], batch["measured_ms"]) == ("b1", "v1", 18.0, 20.0)
    first, second = batch["jobs"]
    assert (first["session"], first["round"], first["verified"], first["accepted"], first["tokens"]) == (
        "234567",
        5,
        3,
        2,
        3,
    )
    assert (second["session"], second["status"], second["tokens"]) == ("fedcba.1", "conflict", 0)


def test_batches_of_two_verifiers_with_one_name_stay_apart() -> None:
    made = record(verified(), verified(verifier="v2"))
    made.settle(1000.0 + SETTLED_MS)
    assert [batch["verifier"] for batch in made.news(0)] == ["v1", "v2"]


def test_a_viewer_gets_each_batch_once() -> None:
    made = record(verified())
    made.settle(1000.0 + SETTLED_MS)
    seen = made.number
    assert made.news(seen) == []
    made.add(verified(batch="b2"), 2000.0)
    made.settle(2000.0 + SETTLED_MS)
    assert [batch["id"] for batch in made.news(seen)] == ["b2"]
    assert [batch["id"] for batch in made.news(0)] == ["b1", "b2"]


def test_neither_tokens_nor_ids_that_resume_a_stream_are_shown() -> None:
    made = record(
        verified(tokens=[31_337, 424_242]),
        verified(run=True, tokens=[271_828], batch="run"),
        builders.heartbeat("v1", {SESSION: 9}),
        builders.ended(SESSION),
    )
    made.settle(1000.0 + SETTLED_MS)
    shown = json.dumps([made.news(0), made.state(1200.0)])
    assert SESSION not in shown
    assert SESSION[:-6] not in shown
    assert not any(token in shown for token in ("31337", "424242", "271828"))


def test_a_label_leaves_most_of_an_id_out() -> None:
    assert label(SESSION) == "234567"
    assert label(f"{SESSION}.12") == "234567.12"


def test_runs_are_reported_in_order_with_the_batches() -> None:
    of_run = verified(run=True, batch="run", tokens=[1, 2], copied=[0], trimmed_to=3, finish=Finish.STOP)
    made = record(of_run, verified(trimmed_to=0, accepted=0))
    made.settle(1000.0 + SETTLED_MS)
    run, batch = made.news(0)
    assert (run["kind"], run["session"], run["tokens"], run["finish"]) == ("run", "234567", 2, "stop")
    assert batch["kind"] == "batch"
    state = made.state(1100.0)
    assert state["run_tokens_per_s"] == round(2 / 1.1, 1)
    assert (state["verified"], state["accepted"]) == (0, 0), "copies are no drafts of drafters"


def test_a_flood_leaves_the_record_small() -> None:
    made = FleetRecord(0.0)
    for number in range(5 * BATCHES_KEPT):
        made.add(verified(f"s{number}", batch=f"b{number}"), float(number))
        made.add(verified(f"s{number}", batch="run", run=True), float(number))
        made.add(builders.heartbeat(f"v{number}"), float(number))
        made.add(builders.drafter_heartbeat(f"d{number}"), float(number))
        made.settle(float(number))
    assert (len(made.finished), len(made.runs)) == (BATCHES_KEPT, RUNS_KEPT)
    state = made.state(5.0 * BATCHES_KEPT)
    assert len(state["verifiers"]) == len(state["drafters"]) == fleet_record.NAMES_KEPT


def test_a_flood_of_open_batches_finishes_the_oldest() -> None:
    made = FleetRecord(0.0)
    for number in range(fleet_record.OPEN_KEPT + 3):
        made.add(verified(batch=f"b{number}"), 1.0)
    assert [batch["id"] for batch in made.news(0)] == ["b0", "b1", "b2"]


def test_the_time_of_a_step_counts_once_for_its_verifier() -> None:
    made = FleetRecord(0.0)
    made.add(builders.heartbeat("v1", total_tokens=100, free_tokens=25), 1000.0)
    for session in ("a", "b", "c"):
        made.add(verified(session, verify_ms=500.0), 1000.0)
    (verifier,) = made.state(1000.0)["verifiers"]
    assert (verifier["busy"], verifier["cache_used"], verifier["alive"]) == (0.5, 0.75, True)


def test_silent_instances_are_shown_as_silent_and_then_not_at_all() -> None:
    made = record(builders.heartbeat("v1"), builders.drafter_heartbeat("d1", sessions=3))
    state = made.state(6000.0)
    assert (state["verifiers"][0]["alive"], state["drafters"][0]["alive"]) == (False, False)
    made.settle(1001.0 + fleet_record.FORGET_MS)
    state = made.state(1001.0 + fleet_record.FORGET_MS)
    assert (state["verifiers"], state["drafters"]) == ([], [])


def test_classes_show_their_queue_slack_and_kept_promises() -> None:
    load = builders.load(classes=[ClassLoad(service_class="fast", sessions=4, waiting=3, queue_ms=7.0, slack_ms=-5.0)])
    slo = Slo(ttft_ms=100.0, tpot_ms=10.0)
    made = record(
        load,
        builders.ended("a", service_class="fast", slo=slo, attained=True),
        builders.ended("b", service_class="fast", slo=slo, attained=False),
        builders.ended("c", service_class="fast", reason="refused"),
        builders.ended("d", service_class="fast", reason="abort"),
    )
    (fast,) = made.state(1100.0)["classes"]
    assert fast == {
        "name": "fast",
        "sessions": 4,
        "waiting": 3,
        "queue_ms": 7.0,
        "slack_ms": -5.0,
        "ended": 2,
        "promised": 2,
        "attained": 1,
        "refused": 1,
    }


def test_rates_cover_the_last_ten_seconds() -> None:
    made = FleetRecord(0.0)
    for second in range(30):
        made.add(verified(batch=f"b{second}"), 1000.0 * second)
        made.settle(1000.0 * second + SETTLED_MS)
    state = made.state(29_500.0)
    assert state["tokens_per_s"] == 3.0
    assert state["batches_per_s"] == 1.0
    assert (state["accepted"], state["verified"]) == (20, 30)
