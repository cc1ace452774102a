"""Recording and replay of a suite with a tiny model, by the command line."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from gateway_peer import CONTEXT, tiny_target
from patience import HANG_S
from transformers import LlamaConfig
from vhosts import vhost

from services.tools.local.brokers import Brokers
from services.tools.local.stack import Stack
from services.tools.replayer import files, journal
from services.tools.replayer.core.batches import recorded_batches
from services.tools.replayer.core.recording import RecordingError
from services.tools.replayer.reexecute import ReexecutionReport, reexecute

TOKENS = 12
PROMPTS = ["the quick brown fox jumps over the lazy dog", "aaaa bbbb aaaa bbbb aaaa bbbb aaaa", "secretword"]


@dataclass
class RecordedSuite:
    """A suite that records, its exported file, and its answers."""

    stack: Stack
    file: Path
    answers: dict[str, list[int]]
    """Committed tokens by session."""


@pytest.fixture(scope="module")
async def recorded(brokers: Brokers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RecordedSuite]:
    folder = tiny_target(tmp_path_factory.mktemp("models") / "tiny")
    config = LlamaConfig(
        vocab_size=folder.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
    )
    tiny.make(folder.path, config)
    env = {
        "WISP_JOURNAL": "true",
        "WISP_DRAFT_SOURCE": "lookup",
        # Drafts of a tiny model never pay; here they are sent all the same, wherever the text repeats itself.
        "WISP_STOP_RULE": "fixed",
        "WISP_DTYPE": "float32",
        "WISP_THREADS": "1",
        "WISP_ADMISSION": "false",
    }
    async with Stack("test-replay", brokers=brokers, target=folder.path, env=env) as running:
        async with httpx.AsyncClient(timeout=HANG_S) as http:
            answers = dict(await asyncio.gather(*(_ask(http, running, prompt) for prompt in PROMPTS)))
        await asyncio.sleep(0.5)  # for the Ended messages of the sessions
        file = tmp_path_factory.mktemp("recordings") / "recording.jsonl.gz"
        await wisp(running, "journal", "export", str(file))
        yield RecordedSuite(running, file, answers)
    await journal.delete(brokers.amqp_url, running.namespace)


async def _ask(http: httpx.AsyncClient, stack: Stack, prompt: str) -> tuple[str, list[int]]:
    answer = await http.post(
        f"{stack.url}/completions",
        json={
            "model": stack.target.name,
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "wisp": {"trace": True},
        },
        headers={"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "60000"},
    )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["id"], [token["id"] for token in body["wisp"]["tokens"]]


async def wisp(stack: Stack, *words: str, fails: bool = False) -> str:
    """Run a command; return its output."""
    env = {**os.environ, "WISP_AMQP_URL": stack.brokers.amqp_url, "WISP_NAMESPACE": stack.namespace, "COLUMNS": "160"}
    command = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", "from services.tools.cli.main import app; app()"),
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    output, errors = await command.communicate()
    assert (command.returncode != 0) == fails, errors.decode()
    return output.decode() + (errors.decode() if fails else "")


def timeline_of(timelines: list[dict[str, Any]], session: str) -> dict[str, Any]:
    [one] = [one for one in timelines if one["session"].partition(".")[0] == session]
    return one


def _committed(timeline: dict[str, Any]) -> list[int]:
    """Return the tokens of a timeline's rounds and runs by position.

    They may overlap: a round that halts a run is answered with tokens that the run reports too.
    """
    found: dict[int, int] = {}
    for part in [*timeline["rounds"], *timeline["runs"]]:
        for position, token in enumerate(part["tokens"], int(part["base_len"])):
            assert found.setdefault(position, token["id"]) == token["id"]
    assert sorted(found) == list(range(min(found), max(found) + 1))
    return [found[position] for position in sorted(found)]


async def test_the_timelines_have_the_clients_tokens(recorded: RecordedSuite) -> None:
    target = str(recorded.stack.target)
    live = json.loads(await wisp(recorded.stack, "replay", "--all", "--json", "--target", target))
    filed = json.loads(
        await wisp(recorded.stack, "replay", "--all", "--json", "--target", target, "--file", str(recorded.file))
    )
    assert len(live) == len(PROMPTS)
    assert filed == live
    for (session, tokens), prompt in zip(recorded.answers.items(), PROMPTS, strict=True):
        one = timeline_of(live, session)
        assert one["prompt_text"] == prompt
        committed = _committed(one)
        assert committed[: len(tokens)] == tokens
        assert len(committed) - len(tokens) in (0, 1), "at most the token that ends the text"
        assert one["attained"]
        assert sum(one["parts"].values()) == pytest.approx(one["total_ms"], rel=0.05)
        # A round that only halts a run may get no batch of its own.
        in_batches = [round_ for round_ in one["rounds"] if round_["batches"]]
        assert in_batches
        for round_ in in_batches:
            assert round_["slack_ms"] > 0
            assert round_["batches"][0]["reason"]
            assert round_["batches"][0]["verify_ms"] > 0
    accepted = [round_["accepted"] for one in live for round_ in one["rounds"]]
    # Where rounds are slow, on a busy machine, sessions are soon decoded in runs, which copy.
    copied = [report["copied"] for one in live for run in one["runs"] for report in run["reports"]]
    assert any(accepted) or any(copied), "some drafts or copies were accepted"
    assert any(one["runs"] for one in live), "some tokens were decoded in runs"


async def test_one_session_is_shown_in_the_terminal(recorded: RecordedSuite) -> None:
    session = next(iter(recorded.answers))
    text = await wisp(
        recorded.stack, "replay", session, "--file", str(recorded.file), "--target", str(recorded.stack.target)
    )
    assert f"session {session}" in text
    assert "in the model" in text
    assert "on verifier-1" in text
    listed = await wisp(recorded.stack, "replay", "--file", str(recorded.file))
    assert len(listed.splitlines()) == 2 + len(PROMPTS)
    wrong = await wisp(recorded.stack, "replay", "nobody", "--file", str(recorded.file), fails=True)
    assert "no session 'nobody' in the recording, which has 3" in wrong


async def test_the_trace_has_a_process_for_each_service(recorded: RecordedSuite, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    await wisp(recorded.stack, "replay", "--file", str(recorded.file), "--trace", str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {process.name for process in recorded.stack.processes()} - {"estimator-1"} == processes


async def test_a_recording_without_text_keeps_its_timelines(
    recorded: RecordedSuite, tmp_path: Path, namespace: str
) -> None:
    bare = tmp_path / "bare.jsonl"
    output = await wisp(recorded.stack, "journal", "export", str(bare), "--without-text")
    assert "without text and tokens" in output
    session, tokens = next(iter(recorded.answers.items()))
    try:
        await wisp(recorded.stack, "journal", "import", str(bare), "--namespace", namespace)
        timelines = json.loads(await wisp(recorded.stack, "replay", "--namespace", namespace, "--all", "--json"))
    finally:
        await journal.delete(recorded.stack.brokers.amqp_url, namespace)
    one = timeline_of(timelines, session)
    assert one["prompt"] == [0] * len(PROMPTS[0])
    committed = _committed(one)
    assert len(committed) >= len(tokens)
    assert set(committed) == {0}
    assert one["parts"]


def verified(recorded: RecordedSuite, file: Path) -> ReexecutionReport:
    """Compute the batches of a file again."""
    return reexecute(recorded_batches(files.read(file)), recorded.stack.target)


def tampered(recorded: RecordedSuite, to: Path, change: Callable[[dict[str, Any]], bool]) -> Path:
    """Write the recording with one result changed: the first for which `change` returns True."""
    done = False
    with gzip.open(recorded.file, "rt") as whole, to.open("w") as copy:
        for line in whole:
            fields = json.loads(line)
            if not done and fields.get("message", {}).get("t") == "Result":
                done = change(fields["message"])
            copy.write(json.dumps(fields) + "\n")
    assert done
    return to


async def test_a_fresh_engine_computes_the_same_bits(recorded: RecordedSuite) -> None:
    report = verified(recorded, recorded.file)
    assert report.differences == []
    assert report.invariant
    assert report.tokens >= sum(map(len, recorded.answers.values()))
    assert report.digests == report.jobs >= report.batches > len(PROMPTS)
    assert not report.left_out


async def test_a_changed_token_is_the_only_difference(recorded: RecordedSuite, tmp_path: Path) -> None:
    session = list(recorded.answers)[1]
    where: dict[str, Any] = {}
    first: list[int] = []

    def change(result: dict[str, Any]) -> bool:
        if not result["session"].startswith(session) or not result["tokens"]:
            return False
        if not first:
            first.append(result["base_len"])
            return False
        where.update(result, right=result["tokens"][0])
        result["tokens"][0] = (result["tokens"][0] + 1) % 259
        return True

    file = tampered(recorded, tmp_path / "tampered.jsonl", change)
    target = str(recorded.stack.target)
    output = await wisp(recorded.stack, "replay", "--verify", "--file", str(file), "--target", target, fails=True)
    [found] = verified(recorded, file).differences
    assert (found.session, found.position) == (where["session"], where["base_len"])
    # A report of a run counts as a batch of its own, with a number.
    assert found.batch.startswith(where["batch"])
    wrong = (where["right"] + 1) % 259
    assert found.said.startswith(f"token {wrong} (")
    assert f"the model chooses {where['right']} (" in found.said
    assert "DIFFERENT" in output
    assert f"session {where['session']}, position {where['base_len']}, batch {found.batch}: token {wrong} (" in output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits_digest": "0123456789abcdef"}, "the tokens are the same, but not the logits' bits: 0123456789abcdef"),
        ({"finish": "stop"}, "the end (stop) was recorded, the model gives"),
    ],
)
async def test_a_changed_digest_or_ending_is_a_difference(
    recorded: RecordedSuite, tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    def change(result: dict[str, Any]) -> bool:
        if result.get("finish"):
            return False
        result.update(changed)
        return True

    [found] = verified(recorded, tampered(recorded, tmp_path / "tampered.jsonl", change)).differences
    assert message in found.said


async def test_a_token_added_at_the_end_is_a_difference(recorded: RecordedSuite, tmp_path: Path) -> None:
    def change(result: dict[str, Any]) -> bool:
        if result.get("finish"):
            result["tokens"].append(5)
        return bool(result.get("finish"))

    [found] = verified(recorded, tampered(recorded, tmp_path / "tampered.jsonl", change)).differences
    assert "tokens, " in found.said
    assert "was recorded, the model gives" in found.said


async def test_other_policies_serve_the_requests_in_virtual_time(recorded: RecordedSuite) -> None:
    file = ("--file", str(recorded.file))
    report = json.loads(await wisp(recorded.stack, "replay", "--policy", "fcfs", "--policy", "sled", "--json", *file))
    runs = report["runs"]
    assert list(runs) == ["recorded", "wisp+ again", "fcfs", "sled"]
    for figures in runs.values():
        assert figures["complete"] == figures["requests"] == figures["promised"] == len(PROMPTS)
        assert figures["tokens"] == runs["recorded"]["tokens"]
        assert figures["attained"] == len(PROMPTS), "an SLO of minutes holds under every policy"
    text = await wisp(recorded.stack, "replay", "--draft-length", "0", *file)
    assert "wisp+, no drafts" in text
    wrong = await wisp(recorded.stack, "replay", "--policy", "best", *file, fails=True)
    assert "no policy 'best' can be replayed: sled, fcfs, edf, wisp, wisp+" in wrong


async def test_a_recording_that_cannot_be_verified_is_refused(recorded: RecordedSuite, tmp_path: Path) -> None:
    bare = tmp_path / "bare.jsonl"
    files.write(bare, files.read(recorded.file), without_text=True)
    output = await wisp(recorded.stack, "replay", "--verify", "--file", str(bare), fails=True)
    assert "without text and tokens, so it cannot be used to verify" in output
    other = tiny_target(tmp_path / "other")
    with pytest.raises(RecordingError, match=r"the recording is of model .* name the model's folder with --target"):
        reexecute(recorded_batches(files.read(recorded.file)), other.path)
    output = await wisp(
        recorded.stack,
        *("replay", next(iter(recorded.answers)), "--verify", "--json"),
        *("--file", str(recorded.file), "--target", str(recorded.stack.target)),
    )
    assert json.loads(output)["same"]


async def test_injected_requests_get_the_same_texts(recorded: RecordedSuite, brokers: Brokers, namespace: str) -> None:
    inject = ("replay", "--inject", "--file", str(recorded.file), "--redis-url", brokers.redis_url)
    own = ("--into", namespace)
    assert "so it is the live one" in await wisp(recorded.stack, *inject, "--vhost", "/", *own, fails=True)
    missing = await wisp(recorded.stack, *inject, "--vhost", "nowhere", *own, fails=True)
    assert "there is no virtual host 'nowhere'" in missing
    async with vhost(brokers, f"vhost-{namespace}") as url:
        there = ("--vhost", f"vhost-{namespace}", *own)
        alone = await wisp(recorded.stack, *inject, *there, fails=True)
        assert "no drafter takes generate.pool" in alone
        env = {**recorded.stack.env, "WISP_AMQP_URL": url, "WISP_JOURNAL": "false", "WISP_POLICY": "fcfs"}
        async with Stack(
            "test-inject",
            brokers=brokers,
            target=recorded.stack.target,
            env=env,
            env_of={"verifier": {"WISP_PROFILE": "false"}},
            namespace=namespace,
        ):
            report = json.loads(await wisp(recorded.stack, *inject, *there, "--speed", "3", "--json"))
    assert report["same"]
    assert report["requests"] == len(PROMPTS)
    assert set(report["ended"]) <= {"stop", "length"}
    assert report["compared"] >= sum(map(len, recorded.answers.values()))
    live = await journal.read(brokers.amqp_url, recorded.stack.namespace)
    assert not any(b"inject-" in one.body for one in live.packed), "the live suite received none of it"
