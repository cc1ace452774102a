"""The manifests of `k8s/` are valid, give the services exactly their settings, and contain no secrets."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from kustomized import ROOT, TOOLS, Manifest, Rendered, tool
from secured import Authority

from services.gateway.server import CLOSING_S
from services.tools.cli.environment import DEPLOYED, SECRET, environment, settings_of
from shared.runtime.settings import variable
from shared.runtime.tracing import exporter_of

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SERVICES = ("gateway", "drafter", "scheduler", "estimator", "verifier")
LEAST_MARGIN_S = 5
TRACED = ("gateway", "drafter", "scheduler", "verifier")
TRACING = {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"}


SLIPS: list[tuple[str, tuple[Any, ...], object]] = [
    ("Deployment", ("spec", "template", "spec", "containers", 0, "livenessProb"), {}),
    ("Deployment", ("spec", "replicas"), "two"),
    ("NetworkPolicy", ("spec", "podSelectors"), {}),
    ("ScaledObject", ("spec", "triggers", 0, "thresholds"), "1"),
    ("ScaledObject", ("spec", "minReplicaCount"), "two"),
    ("ServiceMonitor", ("spec", "endpoint"), []),
    ("PrometheusRule", ("spec", "groups", 0, "rules", 1, "foor"), "1m"),
    ("RabbitmqCluster", ("spec", "replica"), 3),
    ("Redis", ("spec", "TLS", "secretName"), "redis-tls"),
]
"""Mistakes that strict validation has to notice: kind of a manifest, path in it, and value to put there."""


def with_slip(rendered: Rendered, kind: str, path: tuple[Any, ...], value: object) -> Manifest:
    """Return a copy of the first manifest of a kind with a mistake."""
    manifest = copy.deepcopy(next(iter(rendered.of(kind).values())))
    place: Any = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return manifest


@pytest.fixture(scope="module")
def problems(all_rendered: dict[str, Rendered]) -> dict[str, list[str]]:
    """Problems that strict validation reports, by manifest in JSON: all rendered ones, and those with a slip."""
    tool("kubectl")
    manifests = [manifest for rendered in all_rendered.values() for manifest in rendered.manifests]
    manifests += [with_slip(all_rendered["production-operators"], *slip) for slip in SLIPS]
    lines = list(dict.fromkeys(map(json.dumps, manifests)))
    done = subprocess.run(
        [TOOLS / "python", Path(__file__).with_name("strict.py")],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, map(json.loads, done.stdout.splitlines()), strict=True))


def test_every_manifest_passes_strict_validation(rendered: Rendered, problems: dict[str, list[str]]) -> None:
    assert [problem for manifest in rendered.manifests for problem in problems[json.dumps(manifest)]] == []


@pytest.mark.parametrize(("kind", "path", "value"), SLIPS)
def test_a_slip_in_a_manifest_is_noticed(
    all_rendered: dict[str, Rendered],
    problems: dict[str, list[str]],
    kind: str,
    path: tuple[Any, ...],
    value: object,
) -> None:
    assert problems[json.dumps(with_slip(all_rendered["production-operators"], kind, path, value))] != []


def test_each_service_finds_exactly_its_settings(rendered: Rendered) -> None:
    for service in rendered.services():
        names = set(settings_of(service).model_fields)
        found = rendered.environment(service)
        traced = TRACING if rendered.name == "production-operators" and service != "drainorder" else set()
        assert {name for name in found if not name.startswith("WISP_")} == traced, service
        assert exporter_of({name: found[name] or "" for name in traced}) == ("otlp" if traced else None)
        unknown = found.keys() - {variable(name) for name in names} - traced
        assert unknown == set(), f"{service} has no such setting"
        unset = {variable(n) for n, f in settings_of(service).model_fields.items() if f.get_default() in (None, "")}
        missing = {variable(name) for name in names - SECRET} - unset - found.keys()
        assert missing == set(), f"{service} is not told these"


def test_each_service_takes_its_environment(
    rendered: Rendered, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for service in rendered.services():
        with monkeypatch.context() as patch:
            found = rendered.environment(service)
            for name, value in found.items():
                if value is not None:
                    patch.setenv(name, value)
            if "WISP_TLS_CA_FILE" in found:
                # What the pod gets from Secrets.
                patch.setenv("WISP_TLS_CA_FILE", str(Authority(tmp_path).file))
                patch.setenv("WISP_AMQP_URL", "amqps://rabbitmq/")
                patch.setenv("WISP_REDIS_URL", "rediss://redis/")
            settings = settings_of(service)()
        assert settings.metrics_port == 9090
        assert settings.metrics_host == "0.0.0.0"


@pytest.mark.parametrize("service", DEPLOYED)
def test_the_configuration_is_made_from_the_settings(service: str) -> None:
    path = "drain-order/settings.env" if service == "drainorder" else f"base/settings/{service}.env"
    assert (ROOT / "k8s" / path).read_text() == environment(settings_of(service)), "run `make k8s-settings`"


def test_no_image_is_by_latest(rendered: Rendered) -> None:
    images = [c["image"] for _, pod in rendered.pods() for c in pod["spec"]["containers"]]
    images += [m["spec"]["image"] for m in rendered.manifests if m["kind"] == "RabbitmqCluster"]
    assert images
    for image in images:
        _, _, tag = image.rpartition("/")[2].partition(":")
        assert re.match(r"v?\d+\.\d+\.\d+", tag), image
        if "wisp-" in image:
            assert tag == VERSION


def test_no_secret_is_in_the_tree() -> None:
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in tracked.stdout.split() if (ROOT / name).is_file()] or list(
        (ROOT / "k8s").rglob("*")
    )
    assert not [f for f in files if f.parent.name == "secrets" and "overlays" in f.parts]
    for file in files:
        if file.suffix not in {".yaml", ".env", ".conf", ".sh", ".toml", ".md", ".json", ""} or "tests" in file.parts:
            continue
        text = file.read_text(errors="ignore")
        assert "-----BEGIN" not in text or "PRIVATE KEY" not in text, file
        assert not re.search(r"^kind: Secret$", text, re.MULTILINE), f"{file}: secrets go by reference"
        # guest is RabbitMQ's own, good on loopback only.
        for user, password in re.findall(r"(?:amqps?|rediss?)://([^:@/\s]*):([^@/\s]+)@", text):
            assert password in {"guest", "PASSWORD", "{password}"} or password.startswith("$"), f"{file}: {user}"


def test_the_gpus_of_a_verifier_are_one_number(all_rendered: dict[str, Rendered]) -> None:
    (container,) = all_rendered["gpu"].services()["verifier"]["containers"]
    assert (
        container["resources"]["limits"]["nvidia.com/gpu"] == all_rendered["gpu"].environment("verifier")["WISP_GPUS"]
    )


def test_a_verifier_with_a_gpu_is_given_longer_to_start(all_rendered: dict[str, Rendered]) -> None:
    found = {}
    for name in ("production", "gpu"):
        (container,) = all_rendered[name].services()["verifier"]["containers"]
        probe = container["startupProbe"]
        assert probe["httpGet"] == container["livenessProbe"]["httpGet"] == {"path": "/live", "port": "metrics"}
        assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
        found[name] = probe["periodSeconds"] * probe["failureThreshold"]
    assert found == {"production": 180, "gpu": 600}
    rollout = all_rendered["gpu"].of("Deployment")["wisp-verifier"]["spec"]["progressDeadlineSeconds"]
    assert rollout > found["gpu"]


def test_production_brings_no_secret(all_rendered: dict[str, Rendered]) -> None:
    for name in ("production", "gpu", "production-operators"):
        assert all_rendered[name].of("Secret") == {}
        for service in all_rendered[name].services():
            (container,) = all_rendered[name].services()[service]["containers"]
            assert {"secretRef": {"name": f"wisp-{service}"}} in container["envFrom"]


def test_pods_keep_to_the_restricted_standard(rendered: Rendered) -> None:
    for name, template in rendered.pods():
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is (name == "wisp-drainorder")
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        allowed = {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}
        assert all(set(volume) - {"name"} <= allowed for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            assert {"requests", "limits"} <= container["resources"].keys()
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"][
                "requests"
            ].keys()
            assert {"readinessProbe", "livenessProbe"} <= container.keys()


def test_a_pod_is_given_the_time_that_its_service_takes_to_end(rendered: Rendered) -> None:
    for service, pod in rendered.services().items():
        (container,) = pod["containers"]
        takes_s = float(rendered.environment(service).get("WISP_DRAIN_S") or 0)
        if service == "gateway":
            takes_s += CLOSING_S
        if "lifecycle" in container:
            command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
            assert command == "sleep"
            takes_s += float(seconds)
        assert pod["terminationGracePeriodSeconds"] >= takes_s + LEAST_MARGIN_S, service


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Return whether a label selector matches these labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def test_only_the_architectures_connections_are_allowed(rendered: Rendered) -> None:
    labels = {name: template["metadata"]["labels"] for name, template in rendered.pods()}
    policies = rendered.of("NetworkPolicy").values()

    def peers(name: str, direction: str, way: str) -> list[tuple[str, Any]]:
        """Return (receiver, port) pairs that a pod's policies allow; fail for a pod without policies."""
        own = [p["spec"] for p in policies if selects(p["spec"]["podSelector"], labels[name])]
        assert any(direction in spec["policyTypes"] for spec in own), f"{name}: {direction} is open"
        allowed = []
        for spec in own:
            for rule in spec.get(direction.lower(), []):
                for peer in rule.get(way, [{}]):
                    to = peer.get("podSelector", {}).get("matchLabels") or peer.get("ipBlock") or peer
                    assert "ports" in rule
                    allowed += [(str(to), port["port"]) for port in rule["ports"]]
        return allowed

    for service in rendered.services():
        out = {port for _, port in peers(f"wisp-{service}", "Egress", "to")}
        into = {port for _, port in peers(f"wisp-{service}", "Ingress", "from")}
        assert into == ({"http", "metrics"} if service == "gateway" else {"metrics"}), service
        brokers = {"amqp", "redis"} if rendered.name.startswith("local") else {5671, 6379, 6380}
        if rendered.name == "production-operators":
            brokers = {5671, 6379}
        kubernetes = {443, 6443} if service == "drainorder" else set()
        collector = {4318} if rendered.name == "production-operators" and service in TRACED else set()
        assert out == {53} | brokers | kubernetes | collector, service
    for broker in labels.keys() & {"rabbitmq", "redis"}:
        assert peers(broker, "Egress", "to") == []
        assert peers(broker, "Ingress", "from") == [
            ("{'app.kubernetes.io/part-of': 'wisp'}", "amqp" if broker == "rabbitmq" else "redis")
        ]


def test_only_the_drain_order_may_ask_kubernetes_and_only_for_annotations(rendered: Rendered) -> None:
    roles = [m for m in rendered.manifests if m["kind"] in ("Role", "ClusterRole")]
    if "drainorder" not in rendered.services():
        assert roles == []
        return
    (role,) = roles
    assert role["kind"] == "Role"
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]}]
    assert set(rendered.of("ServiceAccount")) == {f"wisp-{service}" for service in rendered.services()}


def test_several_of_a_service_are_spread_and_not_all_taken_away(rendered: Rendered) -> None:
    budgets = rendered.of("PodDisruptionBudget")
    for name in ("gateway", "drafter", "scheduler", "verifier"):
        budget = budgets[f"wisp-{name}"]["spec"]
        template = rendered.of("Deployment")[f"wisp-{name}"]["spec"]["template"]
        assert selects(budget["selector"], template["metadata"]["labels"])
        assert budget["maxUnavailable"] == 1
        for spread in template["spec"]["topologySpreadConstraints"]:
            assert selects(spread["labelSelector"], template["metadata"]["labels"])
            assert set(spread["matchLabelKeys"]) <= template["metadata"]["labels"].keys() | {"pod-template-hash"}


def test_verifiers_stay_where_drafters_go(rendered: Rendered) -> None:
    value = {name: m["value"] for name, m in rendered.of("PriorityClass").items()}
    pods = rendered.services()
    assert value[pods["verifier"]["priorityClassName"]] > value[pods["gateway"]["priorityClassName"]]
    assert value[pods["gateway"]["priorityClassName"]] > value[pods["drafter"]["priorityClassName"]]


def test_what_scales_itself_has_no_fixed_number(all_rendered: dict[str, Rendered]) -> None:
    for name, kind in (("production", "ScaledObject"), ("local-hpa", "HorizontalPodAutoscaler")):
        scaled = {m["spec"]["scaleTargetRef"]["name"] for m in all_rendered[name].of(kind).values()}
        assert scaled == {"wisp-verifier", "wisp-drafter", "wisp-gateway"}
        fixed = {n for n, m in all_rendered[name].of("Deployment").items() if "replicas" in m["spec"]}
        assert fixed == {"wisp-scheduler", "wisp-estimator", "wisp-drainorder"}


def expressions(rendered: Rendered) -> list[str]:
    """Return every Prometheus query."""
    rules = [
        rule for m in rendered.of("PrometheusRule").values() for group in m["spec"]["groups"] for rule in group["rules"]
    ]
    triggers = [trigger for m in rendered.of("ScaledObject").values() for trigger in m["spec"]["triggers"]]
    return [rule["expr"] for rule in rules] + [trigger["metadata"]["query"] for trigger in triggers]


def test_queries_use_existing_metrics(all_rendered: dict[str, Rendered]) -> None:
    from services.drafter import metrics as _drafter  # noqa: F401
    from services.estimator import metrics as _estimator  # noqa: F401
    from services.gateway import metrics as _gateway  # noqa: F401
    from services.scheduler import metrics as _scheduler  # noqa: F401
    from services.verifier import metrics as _verifier  # noqa: F401

    known = set()
    for family in prometheus_client.REGISTRY.collect():
        suffix = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        known |= {family.name + end for end in suffix.get(family.type, ("",))}
    asked = {name for text in expressions(all_rendered["production"]) for name in re.findall(r"\bwisp_\w+", text)}
    assert len(asked) > 5
    assert asked - known == set()
    spaces = {s for text in expressions(all_rendered["production"]) for s in re.findall(r'namespace="(\w+)"', text)}
    assert spaces == {m["metadata"]["namespace"] for m in all_rendered["production"].of("Deployment").values()}


def test_prometheus_finds_every_service(all_rendered: dict[str, Rendered]) -> None:
    rendered = all_rendered["production"]
    (monitor,) = rendered.of("ServiceMonitor").values()
    (service,) = [
        m for m in rendered.of("Service").values() if selects(monitor["spec"]["selector"], m["metadata"]["labels"])
    ]
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} == {
        p["name"] for p in service["spec"]["ports"]
    }
    for name, template in rendered.pods():
        assert selects({"matchLabels": service["spec"]["selector"]}, template["metadata"]["labels"]), name
        ports = [port["name"] for port in template["spec"]["containers"][0]["ports"]]
        assert service["spec"]["ports"][0]["targetPort"] in ports


def test_passwords_are_drawn_once(manifests_folder: Path) -> None:
    secrets = manifests_folder / "overlays/local/secrets"
    before = {file.name: file.read_text() for file in secrets.iterdir()}
    command = ["python3", manifests_folder / "overlays/local/draw_secrets.py"]
    subprocess.run(command, check=True, capture_output=True)
    assert {file.name: file.read_text() for file in secrets.iterdir()} == before
    assert {oct(file.stat().st_mode & 0o777) for file in secrets.iterdir()} == {"0o600"}


def test_the_scaling_benchmark_applies_the_rule_of_the_manifest(all_rendered: dict[str, Rendered]) -> None:
    from services.tools.bench.scaling.core import autoscaling
    from services.tools.bench.scaling.core.autoscaling import SCRAPE_S, SYNC_S, TRIGGERS

    production = all_rendered["production"]
    spec = production.of("ScaledObject")["wisp-verifier"]["spec"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleUp"]["policies"] == [
        {"type": "Percent", "value": 100 * autoscaling.UP_SHARE, "periodSeconds": SYNC_S},
        {"type": "Pods", "value": autoscaling.UP_PODS, "periodSeconds": SYNC_S},
    ]
    assert behavior["scaleDown"] == {
        "stabilizationWindowSeconds": autoscaling.STABLE_S,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": autoscaling.DOWN_EVERY_S}],
    }
    triggers = {trigger["name"]: trigger["metadata"] for trigger in spec["triggers"]}
    assert triggers.keys() == TRIGGERS.keys()
    for name, rule in TRIGGERS.items():
        assert rule.metric in triggers[name]["query"]
        assert float(triggers[name]["threshold"]) == rule.wanted
        over = set(re.findall(r"\[(\d+[sm])\]", triggers[name]["query"]))
        assert over in ({f"{rule.over_s}s"}, {f"{rule.over_s // 60}m"})
    (endpoint,) = production.of("ServiceMonitor")["wisp"]["spec"]["endpoints"]
    assert endpoint["interval"] == f"{SCRAPE_S:.0f}s"
