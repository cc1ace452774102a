"""The local stack without processes: environments, run folders, logs, findings, messages."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, get_args

import builders
import pytest
from pages import ROOT
from typer.testing import CliRunner

from services.baseline.settings import Baseline
from services.drafter.sources.registry import SOURCES
from services.tools.cli import doctor, doctor_servers, suite_observer
from services.tools.cli.core.suite_snapshot import SuiteSnapshot
from services.tools.cli.core.suite_watch import SuiteWatch
from services.tools.cli.demo import busy_note
from services.tools.cli.findings import Finding, short
from services.tools.cli.main import app
from services.tools.cli.stack_options import ServingChoice, draft_sources
from services.tools.cli.suite_address import SuiteAddress
from services.tools.cli.up import curl, require_port
from services.tools.local import folder, logs, servers
from services.tools.local.broker_check import TESTED
from services.tools.local.folder import (
    RUNS_KEPT,
    RunFolder,
    RunningApi,
    RunningSuite,
    note_api,
    note_suite,
    page_of,
    running_apis,
)
from services.tools.local.machine import Machine, version_in
from services.tools.local.ports import free_ports, is_free
from services.tools.local.service_commands import STOP_ORDER, ServiceCommands, cores
from services.tools.local.service_settings import refuse_bad_settings
from services.tools.local.settings import BrokerAddresses
from shared.errors import BrokersError, SettingsError, WispError

LAUNCH = ServiceCommands(
    namespace="mine",
    amqp_url="amqp://here/",
    redis_url="redis://here/",
    target=Path("/models/target"),
    host="127.0.0.1",
    port=0,
    verifiers=2,
    inherited={"PATH": "/bin", "WISP_POLICY": "fcfs", "WISP_METRICS_PORT": "9000", "WISP_NAMESPACE": "other"},
)
BARE = Machine(rabbitmq=None, epmd=None, redis=None, distribution="debian", root=False, apt=True, container=None)


def test_services_get_the_stacks_brokers_names_and_model() -> None:
    environment = LAUNCH.environment("drafter", "drafter-1", {})
    assert environment["WISP_AMQP_URL"] == "amqp://here/"
    assert environment["WISP_REDIS_URL"] == "redis://here/"
    assert environment["WISP_NAMESPACE"] == "mine"
    assert environment["WISP_INSTANCE"] == "drafter-1"
    assert environment["WISP_TARGET"] == "/models/target"
    assert environment["PATH"] == "/bin"


def test_the_demonstration_says_that_the_machine_was_busy() -> None:
    assert busy_note(1.9, 2) == ""
    assert busy_note(7.24, 2).startswith("Other programs kept this machine's 2 cores busy (load 7.2)")


def test_services_inherit_the_users_settings_except_those_of_one_process() -> None:
    environment = LAUNCH.environment("scheduler", "scheduler-1", {})
    assert environment["WISP_POLICY"] == "fcfs"
    assert "WISP_METRICS_PORT" not in environment
    assert "WISP_PORT" not in environment
    assert LAUNCH.environment("gateway", "gateway-1", {})["WISP_PORT"] == "0"


def test_a_process_s_own_environment_goes_before_everything() -> None:
    stack = replace(LAUNCH, env={"WISP_POLICY": "edf", "WISP_LOG_LEVEL": "debug"})
    environment = stack.environment("scheduler", "scheduler-1", {"WISP_POLICY": "own"})
    assert environment["WISP_POLICY"] == "own"
    assert environment["WISP_LOG_LEVEL"] == "debug"


def test_verifiers_share_the_cores_and_the_rest_take_one_thread() -> None:
    assert LAUNCH.environment("verifier", "verifier-1", {})["WISP_THREADS"] == str(max(1, cores() // 2))
    assert LAUNCH.environment("verifier", "verifier-1", {"WISP_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert "WISP_DTYPE" not in LAUNCH.environment("verifier", "verifier-1", {})
    on_gpu = replace(LAUNCH, inherited={"WISP_DEVICE": "cuda"})
    for service in ("verifier", "gateway"):
        assert on_gpu.environment(service, f"{service}-1", {})["WISP_DTYPE"] == "bfloat16"
    chosen = replace(on_gpu, env={"WISP_DTYPE": "float32"})
    assert chosen.environment("verifier", "verifier-1", {})["WISP_DTYPE"] == "float32"
    gateway = LAUNCH.environment("gateway", "gateway-1", {})
    assert (gateway["OMP_NUM_THREADS"], gateway["OMP_WAIT_POLICY"]) == ("1", "passive")


def test_a_run_folder_is_private_and_kept_only_after_an_error(tmp_path: Path) -> None:
    with RunFolder("good", tmp_path) as good:
        assert good.path.stat().st_mode & 0o777 == 0o700
    assert not good.path.exists()
    bad = RunFolder("bad", tmp_path)
    with pytest.raises(ValueError, match="why"), bad:
        raise ValueError("why")
    assert bad.path.is_dir()


def test_old_run_folders_go_unless_their_owner_lives(tmp_path: Path) -> None:
    alive = RunFolder("alive", tmp_path)
    for number in range(RUNS_KEPT + 3):
        RunFolder(f"dead{number}", tmp_path).close(keep=True)
    alive.path.touch()

    os.utime(alive.path, (0, 0))
    last = RunFolder("last", tmp_path)
    assert alive.path.is_dir()
    assert len(list(tmp_path.iterdir())) <= RUNS_KEPT + 2
    last.close()
    alive.close()


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(8)
    assert len(set(ports)) == 8
    assert all(is_free("127.0.0.1", port) for port in ports)
    assert max(ports) < 32_768, "no outgoing connection takes one before its use"


def test_logs_are_found_by_event_and_read_by_people(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert logs.find(log, {"ready"}) is None
    log.write_text('not json\n{"event": "loading"}\n{"event": "ready", "url": "http://x"}\n')
    assert logs.find(log, {"ready", "serving"}) == {"event": "ready", "url": "http://x"}
    crash = {
        "level": "error",
        "event": "crashed",
        "key": 3,
        "service": "verifier",
        "exception": [{"exc_type": "ValueError", "exc_value": "bad", "frames": [{"filename": "a.py", "lineno": 7}]}],
    }
    assert logs.readable(f"plain\n{json.dumps(crash)}") == (
        "  plain\n  error    crashed key=3\n           ValueError: bad (a.py:7)"
    )


async def test_a_port_without_a_server_does_not_answer() -> None:
    (port,) = free_ports(1)
    assert not await logs.answers(f"http://127.0.0.1:{port}/ready")


async def test_doctor_gives_advice_for_each_broker() -> None:
    none = BrokerAddresses(amqp_url=None, redis_url=None)
    rabbitmq, redis = await doctor_servers.check_brokers(none, replace(BARE, container="podman"))
    assert (rabbitmq.state, redis.state) == ("ok", "ok")
    rabbitmq, redis = await doctor_servers.check_brokers(none, replace(BARE, root=True))
    assert (rabbitmq.state, redis.state) == ("note", "note")
    assert "apt-get install" in rabbitmq.advice


@pytest.mark.parametrize(
    ("server", "tested"),
    [
        ("RabbitMQ 3.9.27", False),
        ("RabbitMQ 3.10.0", True),
        ("RabbitMQ 4.3.6", True),
        ("RabbitMQ 4.4.0", False),
        ("Redis 6.2.14", False),
        ("Redis 7.0.15", True),
        ("Redis 8.6.1", True),
        ("Redis 9.0.0", False),
        ("Valkey 7.2.5", False),
        ("Valkey 8.0.1", True),
        ("Valkey 9.1.2", True),
        ("Valkey 10.0.0", False),
        ("Redis of unknown version", False),
    ],
)
async def test_doctor_reports_whether_a_version_was_tested(
    server: str, tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(*_: object) -> str:
        return server

    monkeypatch.setattr(doctor_servers, "check_rabbitmq", check)
    monkeypatch.setattr(doctor_servers, "check_redis", check)
    for finding in await doctor_servers.check_brokers(
        BrokerAddresses(amqp_url="amqp://here/", redis_url="redis://here/"), BARE
    ):
        assert finding.state == ("ok" if tested else "note")
        assert finding.found.startswith(f"{server} ({'tested' if tested else 'not tested'})")
        assert tested or "WISP was tested with" in finding.advice


@pytest.mark.parametrize(
    ("server", "url", "advised"),
    [
        (
            "RabbitMQ 4.3.6",
            "amqp://a/,amqp://b/",
            ("net_ticktime = 5", "consumer_disconnected_timeout = 1000", "advanced.config"),
        ),
        ("RabbitMQ 4.3.6", "amqp://a/", ()),
        ("RabbitMQ 4.0.5", "amqp://a/,amqp://b/", ("net_ticktime = 5", "cluster_partition_handling = autoheal")),
    ],
)
async def test_doctor_names_the_settings_that_a_cluster_needs(
    server: str, url: str, advised: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(*_: object) -> str:
        return server

    monkeypatch.setattr(doctor_servers, "check_rabbitmq", check)
    finding, _ = await doctor_servers.check_brokers(BrokerAddresses(amqp_url=url, redis_url=None), BARE)
    assert finding.state == ("note" if advised else "ok")
    assert all(line in finding.advice for line in advised)
    assert bool(finding.advice) is bool(advised)


def table_of_versions() -> dict[str, set[tuple[int, ...]]]:
    """Return the versions of each server in the table of `services/FAILURES.md`."""
    text = (ROOT / "services/FAILURES.md").read_text("utf-8").partition("## Versions of RabbitMQ and Redis")[2]
    found: dict[str, set[tuple[int, ...]]] = {"RabbitMQ": set(), "Redis": set(), "Valkey": set()}
    for rabbitmq, redis in re.findall(r"^\| ([\d.]+) \| [\d.]+ \| (\w+ [\d.]+) \|", text, re.MULTILINE):
        name, _, version = redis.partition(" ")
        found["RabbitMQ"].add(version_in(rabbitmq))
        found[name].add(version_in(version))
    return found


def test_doctor_and_the_page_name_the_same_versions() -> None:
    table = table_of_versions()
    assert table.keys() == TESTED.keys()
    for name, tested in TESTED.items():
        assert min(table[name])[: len(tested.first)] == tested.first
        assert max(table[name])[: len(tested.last)] == tested.last


@pytest.mark.parametrize(
    "file",
    [
        "docker/compose.yaml",
        "k8s/overlays/local/rabbitmq.yaml",
        "k8s/overlays/local/redis.yaml",
        "k8s/components/operators/rabbitmq.yaml",
        "k8s/components/operators/redis.yaml",
        "services/tools/local/containers.py",
    ],
)
def test_shipped_configuration_names_versions_of_the_page(file: str) -> None:
    images = re.findall(r"/(rabbitmq|redis):v?([\d.]+)", (ROOT / file).read_text("utf-8"))
    assert images
    table = table_of_versions()
    for name, version in images:
        named = version_in(version)
        assert named in {one[: len(named)] for one in table["RabbitMQ" if name == "rabbitmq" else "Redis"]}


def test_doctor_names_the_installed_server(tmp_path: Path) -> None:
    for answer, name in (
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64", "Redis 7.0.15"),
        ("Valkey server v=8.1.1 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64", "Valkey 8.1.1"),
    ):
        program = tmp_path / "server"
        program.write_text(f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(0o755)
        assert doctor_servers._redis_version(program) == name


def test_doctor_checks_the_target_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name, state in (("empty", "missing"), ("nowhere", "missing"), ("model.gguf", "ok")):
        monkeypatch.setenv("WISP_TARGET", str(tmp_path / name))
        found = next(doctor._models())
        assert (found.part, found.state) == ("target", state)
        assert str(tmp_path / name) in found.found
        assert [*doctor._drafts()] == [], "of a target that cannot be used, the draft is no matter"
    monkeypatch.delenv("WISP_TARGET")
    assert "target" not in {one.part for one in doctor._models()}


async def test_doctor_reports_a_given_server_that_does_not_answer() -> None:
    (port,) = free_ports(1)
    given = BrokerAddresses(amqp_url=f"amqp://me:secret@127.0.0.1:{port}/", redis_url=f"redis://127.0.0.1:{port}/0")
    findings = await doctor_servers.check_brokers(given, BARE)
    assert [finding.state for finding in findings] == ["missing", "missing"]
    assert "secret" not in str(findings)


@pytest.mark.parametrize("other", ["wisp-1", "torch 2.13, cpu AVX2"])
async def test_doctor_reports_a_mixed_fleet_and_no_uniform_one(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    async def observed(suite: SuiteAddress, seconds: float) -> SuiteSnapshot:
        assert (suite.namespace, suite.amqp_url, seconds) == ("mine", "amqp://here/", doctor_servers.HEARTBEATS_S)
        watch = SuiteWatch(0.0)
        for name, arithmetic in (("v1", "wisp-1"), ("v2", other)):
            watch.feed(builders.heartbeat(name, arithmetic=arithmetic), 0.0)
        return watch.snapshot(1.0)

    monkeypatch.setattr(suite_observer, "observed", observed)
    monkeypatch.setattr(doctor_servers, "running_suites", lambda: [RunningSuite("mine", "amqp://here/")])
    found = [(one.state, one.found) for one in await doctor_servers.check_fleet(BrokerAddresses(amqp_url=None))]
    mixed = [("note", f"of different arithmetic in mine: v1: wisp-1; v2: {other}")]
    assert found == ([] if other == "wisp-1" else mixed)


async def test_a_check_of_doctor_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    release, begun = threading.Event(), list[str]()

    def hangs() -> Iterator[Finding]:
        release.wait()
        yield Finding("torch", "ok", "too late")

    monkeypatch.setattr(doctor, "_torch", hangs)
    monkeypatch.setattr(doctor, "CHECK_S", 0.2)
    try:
        findings = await doctor.check_machine(begun.append)
    finally:
        release.set()
    (torch,) = [one for one in findings if one.part == "torch"]
    assert (torch.state, torch.found) == ("missing", "this check has not ended within 0.2 s")
    assert begun[-1] == "memory and disk", "the others are made all the same"
    assert begun.index("torch") < begun.index("models")


async def test_an_error_in_a_check_of_doctor_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await doctor.check_machine()


@pytest.mark.parametrize(
    ("shown", "free_bytes", "said"),
    [
        ("Failed to start Ranch listener: eaddrinuse", 10**10, "A port was taken by another program"),
        ("write: No space left on device", 0, "The disk is full: free some space at /run"),
        ("starting", 10**6, "The disk has only 1 MB left: free some space at /run"),
        ("mkdir: Permission denied", 10**10, "Files cannot be written at /run"),
        ("eheap_alloc: Cannot allocate 8 bytes", 10**10, "Memory is short"),
        ("starting", 10**10, "The machine may be too busy"),
        ("crash", 10**10, "Its last lines above say why it ended"),
    ],
)
def test_a_broker_that_does_not_start_has_advice(shown: str, free_bytes: int, said: str) -> None:
    text = servers.advice(shown, Path("/run/rabbitmq.log"), free_bytes, ended=shown == "crash")
    assert text.startswith(f"→ {said}")
    assert "WISP_AMQP_URL" in text
    assert text.endswith("Its log: /run/rabbitmq.log")


async def test_doctor_reports_a_pool_without_drafters(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = SuiteWatch(0.0)

    async def observed(_suite: SuiteAddress, _seconds: float) -> SuiteSnapshot:
        return watch.snapshot(1.0)

    monkeypatch.setattr(suite_observer, "observed", observed)
    monkeypatch.setattr(doctor_servers, "running_suites", lambda: [RunningSuite("mine", "amqp://here/")])
    watch.feed(builders.drafter_heartbeat("s1.pool", sessions=3, drafts=False), 0.0)
    (found,) = await doctor_servers.check_fleet(BrokerAddresses(amqp_url=None))
    assert (found.state, found.part) == ("note", "drafters")
    assert found.found == "none in default pool of mine: schedulers decode its sessions without drafts"
    watch.feed(builders.drafter_heartbeat("d1"), 0.0)
    assert await doctor_servers.check_fleet(BrokerAddresses(amqp_url=None)) == []


@pytest.mark.parametrize("error", [BrokersError("away"), SettingsError("there is no suite")])
async def test_doctor_reports_no_suite_that_it_cannot_observe(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def observed(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(suite_observer, "observed", observed)
    monkeypatch.setattr(doctor_servers, "running_suites", list)
    assert await doctor_servers.check_fleet(BrokerAddresses(amqp_url="amqp://here/")) == []


def test_doctor_as_json_names_every_part() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    parts = {finding["part"] for finding in json.loads(result.output)}
    assert {"Python", "torch", "RabbitMQ", "Redis", "port", "memory", "disk", "model smollm2-135m-instruct"} <= parts


def test_doctor_shortens_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert short(tmp_path / "a" / "b") == "a/b"
    monkeypatch.chdir("/")
    assert short(tmp_path / "home" / "b") == "~/b"
    assert short(tmp_path / "c") == str(tmp_path / "c")


def test_a_busy_port_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        result = CliRunner().invoke(app, ["up", "--port", str(port)])
    assert result.exit_code == 1
    assert f"port {port} on 127.0.0.1 is in use by another program" in " ".join(result.stderr.split())


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of its own; returns its folder of runs."""
    monkeypatch.setattr(folder, "state_folder", lambda: tmp_path)
    return tmp_path / "run"


def test_a_port_that_a_suite_of_this_checkout_uses_is_explained(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy, RunFolder("up") as run:
        port = busy.getsockname()[1]
        note_api(run.path, RunningApi("http://127.0.0.1:1/v1", 1))
        with pytest.raises(WispError, match="by another program"):
            require_port("127.0.0.1", port)
        note_api(run.path, RunningApi(f"http://127.0.0.1:{port}/v1", 4711))
        with pytest.raises(WispError) as refused:
            require_port("127.0.0.1", port)
    for advice in ("`wisp chat`", f"http://127.0.0.1:{port}/v1", "`kill 4711`", f"PORT={port + 1}"):
        assert advice in str(refused.value)


def test_the_page_is_beside_the_api() -> None:
    assert page_of("http://127.0.0.1:8000/v1") == page_of("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000/"
    assert page_of("https://wisp.example.org/llm/v1") == "https://wisp.example.org/llm/"


def test_running_apis_are_those_whose_owner_lives(state: Path) -> None:
    run = RunFolder("up")
    note_api(run.path, RunningApi("http://127.0.0.1:8000/v1", 1))
    (run.path.parent / "torn").mkdir()
    (run.path.parent / "torn" / "api.json").write_text('{"url": "http://')
    assert running_apis() == [RunningApi("http://127.0.0.1:8000/v1", 1)]
    run.close(keep=True)
    assert running_apis() == []


def test_doctor_names_the_suites_that_run_here(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor_servers.check_apis()) == []
    with socket.create_server(("127.0.0.1", 0)) as busy, RunFolder("up") as suite, RunFolder("up") as baseline:
        port = busy.getsockname()[1]
        monkeypatch.setattr(doctor, "API_PORT", port)
        (taken,) = doctor._port()
        note_api(suite.path, RunningApi(f"http://127.0.0.1:{port}/v1", 4711))
        note_suite(suite.path, RunningSuite("wisp-abc", None))
        note_api(baseline.path, RunningApi("http://127.0.0.1:1/v1", 4712))
        (own,) = doctor._port()
        found = {one.found for one in doctor_servers.check_apis()}
    assert found == {
        f"http://127.0.0.1:{port}/v1 (wisp-abc, process 4711)",
        "http://127.0.0.1:1/v1 (a baseline, process 4712)",
    }
    assert (taken.state, own.state) == ("note", "ok"), "a suite of one's own on the port is no fault"


@pytest.mark.parametrize("end", [KeyboardInterrupt, asyncio.CancelledError])
def test_up_records_its_api_and_ends_quietly_when_stopped(
    state: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    noted: list[RunningApi] = []

    class ReadyStack:
        """A stack that is ready at once and interrupted then."""

        url, serving, env, target = "http://127.0.0.1:8000/v1", "wisp", {}, Path("/models/tiny")

        async def __aenter__(self) -> ReadyStack:
            self.run = RunFolder("up")
            self.folder = self.run.path
            return self

        async def __aexit__(self, *_: object) -> None:
            self.run.close()

        async def next_failure(self) -> NoReturn:
            noted.extend(running_apis())
            raise end

    monkeypatch.setattr("services.tools.cli.main.stack_for", lambda *_, **__: ReadyStack())
    result = CliRunner().invoke(app, ["up", "--port", "0"], catch_exceptions=False)
    assert noted == [RunningApi("http://127.0.0.1:8000/v1", os.getpid())]
    assert result.exit_code == 0
    assert result.stdout.rstrip().endswith("Ctrl-C stops everything.")
    assert list(state.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "WISP_POLICY",
            "foo",
            "WISP_POLICY: must be 'sled', 'fcfs', 'edf', 'wisp', 'wisp+' or 'adaserve' (given: 'foo')",
        ),
        ("WISP_WITHOUT", "trimming", 'for example WISP_WITHOUT=["estimator"]'),
        ("WISP_KV_HANDOFF_MB", "much", "for example WISP_KV_HANDOFF_MB=512"),
        ("WISP_DEVICE_PROFILE", "toaster", "no hardware profile toaster"),
        ("WISP_HIDDEN_DRAFT", "/nosuch", "WISP_HIDDEN_DRAFT: there is no /nosuch"),
        ("WISP_AMQP_URL", "amqp://ann:hid#den@rabbit/", "WISP_AMQP_URL: the URL contains '#'"),
        ("WISP_REDIS_URL", "localhost", "WISP_REDIS_URL must begin with redis://"),
        ("WISP_NAMESPACE", "a b", "for example WISP_NAMESPACE=namespace-1"),
    ],
)
@pytest.mark.parametrize("command", ["up", "demo", "chat"])
def test_bad_settings_are_refused_before_anything_starts(
    command: str, name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> NoReturn:
        raise AssertionError("started")

    monkeypatch.setattr("services.tools.cli.chat.running_apis", list)
    monkeypatch.setattr("services.tools.local.target.prepare_target", started)
    monkeypatch.setattr("services.tools.local.brokers.Brokers.start", started)
    result = CliRunner().invoke(app, [command], env={name: value}, catch_exceptions=False)
    assert result.exit_code == 1
    assert f"error: {name}" in result.stderr or "error: no hardware profile" in result.stderr
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("evaluate --final --record rounds.jsonl", "may not train a controller: leave out --final or --record"),
        ("train --from . --out draft", "--from needs a folder of its own for the run"),
    ],
)
def test_options_of_draft_that_spoil_a_run_are_refused(call: str, said: str) -> None:
    result = CliRunner().invoke(app, ["draft", *call.split()], catch_exceptions=False)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())


def test_every_problem_of_all_services_is_named_once() -> None:
    commands = replace(LAUNCH, inherited={"WISP_POLICY": "foo", "WISP_LOG_LEVEL": "loud", "WISP_DTYPE": ""})
    with pytest.raises(SettingsError) as refused:
        refuse_bad_settings(commands, {service: {} for service in STOP_ORDER if service != "baseline"})
    lines = sorted(str(refused.value).splitlines())
    assert [line.partition(":")[0] for line in lines] == ["WISP_LOG_LEVEL", "WISP_POLICY"]


def test_a_misspelt_setting_is_refused_and_a_strange_one_ignored() -> None:
    inherited = {"WISP_POLICI": "edf", "WISP_GATEWAY_PORT": "tcp://10.0.0.1:80", "WISP_POLICY": "edf"}
    with pytest.raises(SettingsError, match=r"^WISP_POLICI: no setting has this name; did you mean WISP_POLICY\?$"):
        refuse_bad_settings(replace(LAUNCH, inherited=inherited), {"gateway": {}})


def test_a_draft_model_has_to_be_named() -> None:
    result = CliRunner().invoke(app, ["up", "--port", "0", "--draft", "model"])
    assert result.exit_code == 1
    assert "--draft-model FOLDER" in result.stderr


def test_chat_reports_a_url_without_a_gateway() -> None:
    (port,) = free_ports(1)
    result = CliRunner().invoke(app, ["chat", "--url", f"http://127.0.0.1:{port}/v1"])
    assert result.exit_code == 1
    assert "no gateway answers" in result.stderr


def test_the_curl_line_survives_the_shell() -> None:
    words = shlex.split(curl("http://127.0.0.1:1/v1", "it's a model"))
    assert words[2] == "http://127.0.0.1:1/v1/chat/completions"
    body = json.loads(words[-1])
    assert body["model"] == "it's a model"
    assert body["temperature"] == 0, "so that its answer can be repeated"


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys, services.tools.cli.main\n"
        "heavy = {'torch', 'transformers', 'openai', 'aio_pika', 'pydantic', 'numpy', 'psutil'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_choices_of_drafts_and_baselines_are_those_of_the_services() -> None:
    assert draft_sources() == sorted(SOURCES)
    assert [choice.value for choice in ServingChoice] == ["wisp", *get_args(Baseline)]


def test_the_doctor_looks_for_what_the_extras_install() -> None:
    """The packages that an extra names, and numba's own library, which the kernels use directly."""
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {re.split(r"[<>=]", package)[0] for package in declared["model"]}
    shared = {"tokenizers", "jinja2", "llguidance"}
    assert shared <= set(doctor.EXTRAS["gateway"])
    assert named - shared <= set(doctor.EXTRAS["model"])
    assert "llvmlite" in doctor.EXTRAS["model"]
