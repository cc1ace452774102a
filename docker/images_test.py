"""The images in containers: what is in them, the compose file's stack, lost and added verifiers, Kubernetes' manifests.

`make images-test`; needs root, Debian and some minutes. Everything that it makes is under `.wisp/images` and in
containers and networks that it removes.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import os
import sys
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx
import pytest
import yaml
from openai import AsyncOpenAI

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/manifests"))

from containers import ROOT, Podman, build, install, version
from kustomized import Rendered, copied, render

from services.tools.bench.support.report import keep
from services.tools.local.ports import free_ports

pytestmark = pytest.mark.timeout(1800)
USER = "10001"
QUESTIONS = [
    "Why is the sky blue?",
    "Write a short story about a lighthouse.",
    "List five uses of a paper clip.",
    "Explain how a bicycle stays upright.",
]
TOKENS = 64
UNITS = {"Mi": 2**20, "Gi": 2**30}


@pytest.fixture(scope="session")
def podman() -> Podman:
    install()
    return Podman()


@pytest.fixture(scope="session")
def images(podman: Podman) -> dict[str, str]:
    return build(podman)


class Compose:
    """The compose file's stack under a name of its own."""

    def __init__(self, podman: Podman, brokers: str, *more: str, **env: str) -> None:
        """more: options before the command. env: additions to the environment."""
        self.podman = podman
        self.more = more
        self.name = f"wisp-test-{token_hex(3)}"
        (self.port,) = free_ports(1)
        self.env = {
            "WISP_RABBITMQ_IMAGE": brokers,
            "WISP_REDIS_IMAGE": brokers,
            "WISP_API": f"127.0.0.1:{self.port}",
            **env,
        }

    def __call__(self, *arguments: str) -> str:
        return self.podman.run(["docker/compose.sh", *self.more, "-p", self.name, *arguments], env=self.env)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def containers(self, service: str | None = None) -> list[str]:
        """Return the names of the running containers."""
        label = f"label=io.podman.compose.project={self.name}"
        chosen = ["--filter", f"label=com.docker.compose.service={service}"] if service else []
        return self.podman("ps", "--filter", label, *chosen, "--format", "{{.Names}}").split()

    def remove(self) -> None:
        """Stop and remove everything, including instances added later, which podman-compose leaves."""
        every = self.podman("ps", "-aq", "--filter", f"label=io.podman.compose.project={self.name}").split()
        self.podman("rm", "--force", "--time", "5", "--depend", *every, check=False)
        self("down", "--volumes")

    def until_ready(self, verifiers: int) -> None:
        """Wait until all containers are healthy."""
        end = time.monotonic() + 120
        while len(self.containers("verifier")) != verifiers and time.monotonic() < end:
            time.sleep(0.5)
        assert len(self.containers("verifier")) == verifiers
        self.podman.until_healthy(*self.containers())


@pytest.fixture(scope="module")
def compose(podman: Podman, images: dict[str, str]) -> Iterator[Compose]:
    stack = Compose(podman, images["brokers"])
    try:
        stack("up", "-d", "--scale", "verifier=2")
        stack.until_ready(2)
        yield stack
    finally:
        stack.remove()


@pytest.fixture
async def client(compose: Compose) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=compose.url, api_key="none", max_retries=30, timeout=300) as opened:
        yield opened


async def answer(client: AsyncOpenAI, number: int, draft: str | None = None) -> tuple[str, float]:
    """Stream a completion that depends on its number alone; return it with its longest gap in seconds."""
    model = (await client.models.list()).data[0].id
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
        seed=number,
        temperature=0.7 if number % 2 else 0.0,
        max_tokens=TOKENS,
        stream=True,
        extra_body={"wisp": {"draft": draft}} if draft else {},
    )
    text, gap_s, last = "", 0.0, time.monotonic()
    async for chunk in stream:
        now = time.monotonic()
        gap_s, last = max(gap_s, now - last), now
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    return text, gap_s


async def answers(client: AsyncOpenAI, numbers: range) -> list[tuple[str, float]]:
    """Stream several completions at once."""
    return list(await asyncio.gather(*(answer(client, number) for number in numbers)))


@pytest.fixture(scope="module")
def known() -> dict[int, str]:
    return {}


async def expected(client: AsyncOpenAI, known: dict[int, str], numbers: range) -> list[str]:
    """The completions by plain decoding, one after another, in an undisturbed stack."""
    for number in numbers:
        if number not in known:
            known[number] = (await answer(client, number, draft="none"))[0]
    return [known[number] for number in numbers]


@pytest.mark.parametrize("name", ["services", "cpu"])
def test_an_image_holds_what_runs_and_nothing_else(podman: Podman, images: dict[str, str], name: str) -> None:
    code = """
import importlib.util as u, os, pathlib, shutil, json
print(json.dumps({
    "uid": os.getuid(),
    "torch": u.find_spec("torch") is not None,
    "openai": u.find_spec("openai") is not None,
    "pip": u.find_spec("pip") is not None or shutil.which("pip") is not None,
    "compilers": [c for c in ("gcc", "cc", "make", "g++") if shutil.which(c)],
    "models": {m.name: sorted(f.name for f in m.iterdir()) for m in pathlib.Path("/models").iterdir()},
}))
"""
    found = json.loads(podman("run", "--rm", "--read-only", "--network=none", images[name], "python", "-c", code))
    assert found["uid"] == int(USER)
    assert found["torch"] is (name == "cpu")
    assert found["openai"] is (name == "cpu")
    assert (found["pip"], found["compilers"]) == (False, [])
    places = "/root/.cache /src /build /wheel /packaged /prepared /var/lib/apt/lists/* /tmp/*"
    listing = ["--user=0", images[name], "sh", "-c", f"ls -d {places} 2>/dev/null || true"]
    assert podman("run", "--rm", "--read-only", "--network=none", *listing) == ""
    (model,) = found["models"].values()
    assert ("model.safetensors" in model) is (name == "cpu")
    labels = json.loads(podman.inspect("{{json .Labels}}", images[name]))
    assert labels["org.opencontainers.image.version"] == version()
    assert labels["org.opencontainers.image.revision"] == podman.run(["git", "rev-parse", "HEAD"])
    assert podman.inspect("{{.User}}", images[name]) == f"{USER}:{USER}"


@pytest.mark.parametrize("name", ["services", "cpu"])
def test_an_image_holds_this_checkouts_sources(podman: Podman, images: dict[str, str], name: str) -> None:
    """The sources are not those of an earlier build with reused layers."""
    code = """
import hashlib, json, pathlib, shared
root = pathlib.Path(shared.__file__).parents[1]
files = [file for package in ("services", "shared") for file in (root / package).rglob("*.*")]
files = [file for file in files if file.suffix in (".py", ".lua")]
print(json.dumps({str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}))
"""
    inside = json.loads(podman("run", "--rm", "--network=none", images[name], "python", "-c", code))
    assert {"services/gateway/app.py", "shared/state/commit.lua"} <= inside.keys()
    here = {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in inside}
    assert inside == here


def test_sizes_are_told(podman: Podman, images: dict[str, str]) -> None:
    sizes = {name: round(int(podman.inspect("{{.Size}}", images[name])) / 1e6) for name in ("services", "cpu")}
    base = round(int(podman.inspect("{{.Size}}", os.environ.get("BASE") or "localhost/wisp-base:bookworm")) / 1e6)
    keep("images", {"megabytes": sizes | {"base": base}})
    print(f"megabytes: {sizes}, of which the base is {base}")
    assert sizes["services"] - base < 400 < sizes["cpu"]


def test_a_service_without_brokers_says_so_and_is_not_healthy(podman: Podman, images: dict[str, str]) -> None:
    name = f"wisp-test-{token_hex(3)}"
    podman(
        "run",
        "-d",
        "--name",
        name,
        "--read-only",
        "--tmpfs=/tmp",
        images["services"],
        "python",
        "-m",
        "services.scheduler",
    )
    try:
        assert not podman.healthy(name)
        assert podman("wait", name) == "1"
        assert "RabbitMQ cannot be used at" in podman.logs(name)
    finally:
        podman("rm", "-f", name)


def test_the_containers_match_the_compose_file(compose: Compose) -> None:
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    for name, service in services.items():
        if "profiles" in service:
            continue
        containers = compose.containers(name)
        assert len(containers) == (2 if name == "verifier" else 1)
        (found,) = json.loads(compose.podman("inspect", containers[0]))
        config, host = found["Config"], found["HostConfig"]
        assert host["ReadonlyRootfs"] is service["read_only"] is True
        assert "CAP_CHOWN" in host["CapDrop"]
        assert not found["EffectiveCaps"]
        assert "no-new-privileges" in host["SecurityOpt"]
        assert config["User"] == service.get("user", f"{USER}:{USER}")
        assert host["Memory"] == (2 * UNITS["Gi"] if service.get("mem_limit") == "2g" else 0)
        if name not in ("rabbitmq", "redis"):
            assert config["Cmd"] == service["command"]
            environment = dict(line.split("=", 1) for line in config["Env"])
            assert service["environment"].keys() <= environment.keys()
        published = [one for bound in host["PortBindings"].values() for one in bound or []]
        wanted = [{"HostIp": "127.0.0.1", "HostPort": str(compose.port)}] if "ports" in service else []
        assert published == wanted


def test_the_health_check_proves_the_consumer(compose: Compose) -> None:
    (scheduler,) = compose.containers("scheduler")
    (rabbitmq,) = compose.containers("rabbitmq")
    assert compose.podman.healthy(scheduler)
    compose.podman("pause", rabbitmq)
    try:
        assert not compose.podman.healthy(scheduler), "its process is there, and its consumer does not answer"
    finally:
        compose.podman("unpause", rabbitmq)
    compose.podman.until_healthy(scheduler)


def test_the_demo_runs_against_the_stack(compose: Compose) -> None:
    shown = compose("--profile", "demo", "run", "--rm", "-T", "demo")
    assert shown.count("identical to plain decoding: yes") == 1, shown[-2000:]


def test_beyond_loopback_requests_need_a_key(podman: Podman, images: dict[str, str], tmp_path: Path) -> None:
    def keys(*words: str) -> str:
        command = [str(Path(sys.executable).with_name("wisp")), "keys", *words, "--file", str(tmp_path / "keys.json")]
        return podman.run(command)

    key = keys("new", "ann")
    for shown in (tmp_path, tmp_path / "keys.json"):
        shown.chmod(0o755)
    stack = Compose(podman, images["brokers"], "--file", "compose.keys.yaml", WISP_KEYS=str(tmp_path))

    def status(**headers: str) -> int:
        return httpx.get(f"{stack.url}/models", headers=headers).status_code

    try:
        stack("up", "-d", "gateway")
        podman.until_healthy(*stack.containers("gateway"))
        assert status() == 401
        assert status(authorization=f"Bearer {key}") == 200
        keys("revoke", "ann")
        end = time.monotonic() + 20
        while status(authorization=f"Bearer {key}") != 401:
            assert time.monotonic() < end, "the gateway has not heard of it"
            time.sleep(0.5)
    finally:
        stack.remove()


async def test_killing_a_verifier_changes_no_text(compose: Compose, client: AsyncOpenAI, known: dict[int, str]) -> None:
    numbers = range(6)
    wanted = await expected(client, known, numbers)
    asked = asyncio.create_task(answers(client, numbers))
    await asyncio.sleep(1.5)
    victim = compose.containers("verifier")[0]
    await asyncio.to_thread(compose.podman, "kill", "--signal=KILL", victim)
    assert not asked.done(), "the verifier was killed too late"
    got = await asked
    assert [text for text, _ in got] == wanted
    print(f"longest gap after a kill: {max(gap for _, gap in got):.1f} s")
    await asyncio.to_thread(compose.podman, "start", victim)
    await asyncio.to_thread(compose.until_ready, 2)


async def test_scaling_to_three_and_back_under_load_changes_no_text(
    compose: Compose, client: AsyncOpenAI, known: dict[int, str]
) -> None:
    numbers = range(6)
    wanted = await expected(client, known, numbers)
    stop = asyncio.Event()
    rounds: list[list[tuple[str, float]]] = []

    async def load() -> None:
        while not stop.is_set():
            rounds.append(await answers(client, numbers))

    loading = asyncio.create_task(load())
    try:
        await asyncio.sleep(2)
        await asyncio.to_thread(compose, "up", "-d", "--no-recreate", "--scale", "verifier=3")
        await asyncio.to_thread(compose.until_ready, 3)
        before = len(rounds)
        while len(rounds) < before + 2 and not loading.done():  # noqa: ASYNC110 - they come when they come
            await asyncio.sleep(0.2)
        for container in compose.containers("verifier")[1:]:
            status = await asyncio.to_thread(stopped, compose.podman, container)
            assert status == "0", compose.podman.logs(container)
        before = len(rounds)
        while len(rounds) < before + 1 and not loading.done():  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    finally:
        stop.set()
        await loading
    assert len(rounds) >= 4
    for got in rounds:
        assert [text for text, _ in got] == wanted
    print(f"{len(rounds)} rounds of {len(numbers)}; longest gap {max(g for got in rounds for _, g in got):.1f} s")


def stopped(podman: Podman, container: str, grace_s: int = 35) -> str:
    """Stop a container as Kubernetes does; return its exit status, 0 if it drained within its grace period."""
    podman("stop", "--time", str(grace_s), container)
    return podman.inspect("{{.State.ExitCode}}", container)


PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@dataclass(frozen=True)
class Played:
    """The overlay `local` in podman."""

    podman: Podman
    rendered: Rendered

    def containers(self, deployment: str) -> list[str]:
        """Return its containers, one per replica."""
        replicas = self.rendered.of("Deployment")[deployment]["spec"]["replicas"]
        return [f"{deployment}-pod-{number}-wisp" for number in range(replicas)]

    def address(self, container: str, port: str | int) -> str:
        """Return the address of a pod's port, given by its name in the manifest or by its number."""
        pod = container.removesuffix("-wisp")
        deployment = pod.rpartition("-pod-")[0]
        (named,) = self.rendered.of("Deployment")[deployment]["spec"]["template"]["spec"]["containers"]
        numbers = {one["name"]: one["containerPort"] for one in named["ports"]}
        infra = self.podman("pod", "inspect", "--format", "{{.InfraContainerID}}", pod)
        ip = self.podman.inspect("{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", infra)
        return f"http://{ip}:{numbers.get(str(port), port)}"

    def answers(self, container: str, probe: dict[str, Any]) -> bool:
        """Send a probe as the kubelet does."""
        address = self.address(container, probe["httpGet"]["port"]) + probe["httpGet"]["path"]
        try:
            return httpx.get(address, timeout=probe["timeoutSeconds"]).is_success
        except httpx.HTTPError:
            return False


def playable(rendered: Rendered) -> str:
    """Return the overlay's ConfigMaps and Deployments without fields that podman handles unlike Kubernetes."""
    deployments = copy.deepcopy(rendered.of("Deployment"))
    maps = copy.deepcopy(rendered.of("ConfigMap"))
    for manifest in deployments.values():
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        # It publishes every port that is named on the host, where replicas collide.
        del container["ports"]
        # It would have them asked by systemd, with a curl in the container; the test asks as the kubelet does.
        for probe in PROBES:
            del container[probe]
        # It lets `envFrom` overrule `env`; Kubernetes the other way round.
        if env := container.pop("env", []):
            name = f"{manifest['metadata']['name']}-env"
            data = {one["name"]: one["value"] for one in env}
            maps[name] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}
            container["envFrom"].append({"configMapRef": {"name": name}})
    return yaml.dump_all([*maps.values(), *deployments.values()])


@pytest.fixture
def played(podman: Podman, images: dict[str, str], tmp_path: Path) -> Iterator[Played]:
    """The overlay `local` with its Deployments as pods of podman.

    podman does not play StatefulSets, so RabbitMQ and Redis are containers with the manifests' files, commands and
    secrets."""
    rendered = render(copied(tmp_path / "k8s"), "local")
    name = f"wisp-kube-{token_hex(3)}"
    file = tmp_path / "local.yaml"
    file.write_text(playable(rendered))
    podman("network", "create", name)
    made: list[str] = []
    try:
        for broker in ("rabbitmq", "redis"):
            start_stateful(podman, rendered, broker, name, images["brokers"], tmp_path)
        for secret in rendered.of("Secret").values():
            # As this podman keeps them: the data alone, in JSON.
            podman("secret", "create", secret["metadata"]["name"], "-", input=json.dumps(secret["data"]))
            made.append(secret["metadata"]["name"])
        podman("play", "kube", "--network", name, "--log-driver=k8s-file", str(file))
        yield Played(podman, rendered)
    finally:
        podman("play", "kube", "--down", str(file), check=False)
        for broker in ("rabbitmq", "redis"):
            podman("rm", "-f", "-v", f"{name}-{broker}", check=False)
        for secret in made:
            podman("secret", "rm", secret, check=False)
        podman("network", "rm", "-f", name, check=False)


def start_stateful(podman: Podman, rendered: Rendered, name: str, network: str, image: str, folder: Path) -> None:
    """Run a StatefulSet's pod as a container."""
    pod = rendered.of("StatefulSet")[name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--user=999:999"]
    for source in container.get("envFrom", []):
        data = rendered.of("Secret")[source["secretRef"]["name"]]["data"]
        options += [f"--env={key}={b64decode(value).decode()}" for key, value in data.items()]
    options += [f"--env={one['name']}={one['value']}" for one in container.get("env", [])]
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for mount in container["volumeMounts"]:
        volume = volumes.get(mount["name"], {})
        if "configMap" in volume:
            files = folder / name
            files.mkdir()
            for key, text in rendered.of("ConfigMap")[volume["configMap"]["name"]]["data"].items():
                (files / key).write_text(text)
            files.chmod(0o755)
            options.append(f"--volume={files}:{mount['mountPath']}:ro")
        else:
            # A new volume is its user's, as fsGroup makes one; a tmpfs would be root's.
            options.append(f"--mount=type=volume,destination={mount['mountPath']}")
    command = [*container.get("command", []), *container.get("args", [])]
    podman(
        "run",
        "-d",
        "--name",
        f"{network}-{name}",
        "--network",
        network,
        f"--network-alias={name}",
        *options,
        image,
        *command,
    )


async def test_the_local_overlays_deployments_play_in_podman(played: Played) -> None:
    podman, deployments = played.podman, played.rendered.of("Deployment")
    assert set(deployments) == {f"wisp-{s}" for s in ("gateway", "drafter", "scheduler", "estimator", "verifier")}
    pods = {
        container: deployment["spec"]["template"]["spec"]
        for name, deployment in deployments.items()
        for container in played.containers(name)
    }
    assert len(pods) == 6
    end = time.monotonic() + 180
    for probe in PROBES:
        waiting = set(pods)
        while waiting and time.monotonic() < end:
            waiting = {c for c in waiting if not played.answers(c, pods[c]["containers"][0][probe])}
        assert not waiting, {container: podman.logs(container) for container in waiting}
    for container, pod in pods.items():
        assert podman.inspect("{{.HostConfig.ReadonlyRootfs}}", container) == "true"
        assert podman("exec", container, "id", "-u") == USER
        limit = pod["containers"][0]["resources"]["limits"]["memory"]
        assert int(podman.inspect("{{.HostConfig.Memory}}", container)) == int(limit[:-2]) * UNITS[limit[-2:]]
    (gateway,) = played.containers("wisp-gateway")
    url = f"{played.address(gateway, 'http')}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        plain = (await answer(client, 1, draft="none"))[0]
        assert plain
        assert (await answer(client, 1))[0] == plain
    for container, pod in pods.items():
        assert stopped(podman, container, pod["terminationGracePeriodSeconds"]) == "0", podman.logs(container)
