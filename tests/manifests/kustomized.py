"""Renders the manifests of `k8s/`, with newly drawn passwords for overlays that need them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".wisp/tools/bin"
OVERLAYS = ("local", "production", "gpu")
COMBINED = {
    "local-hpa": ("local", ["hpa"]),
    "local-keda-monitoring": ("local", ["keda", "monitoring"]),
    "local-model-volume": ("local", ["model-volume"]),
    "production-operators": ("production", ["operators", "tracing"]),
}
"""Overlays with components, as users combine them."""
VARIANTS = (*OVERLAYS, *COMBINED)

Manifest = dict[str, Any]


def tool(name: str) -> str:
    """Return a checker's path; fail the test if it is not installed."""
    if not (TOOLS / name).exists():
        pytest.fail(f"{name} is not installed; `make tools` does it, and `make test` before the tests")
    return str(TOOLS / name)


@dataclass(frozen=True)
class Rendered:
    """The manifests that `kubectl apply -k` would send."""

    name: str
    text: str

    @cached_property
    def manifests(self) -> list[Manifest]:
        """All manifests."""
        return list(yaml.load_all(self.text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))

    def of(self, kind: str) -> dict[str, Manifest]:
        """Return the manifests of a kind, by name."""
        return {m["metadata"]["name"]: m for m in self.manifests if m["kind"] == kind}

    def pods(self) -> Iterator[tuple[str, Manifest]]:
        """Yield name and pod template of everything that creates pods."""
        for manifest in self.manifests:
            if manifest["kind"] in ("Deployment", "StatefulSet", "Job", "DaemonSet"):
                yield manifest["metadata"]["name"], manifest["spec"]["template"]

    def services(self) -> dict[str, Manifest]:
        """The pods of WISP's own services, by service."""
        return {
            name.removeprefix("wisp-"): template["spec"] for name, template in self.pods() if name.startswith("wisp-")
        }

    def environment(self, service: str) -> dict[str, str | None]:
        """Return the environment of a service's process; None for values of secrets outside the manifests."""
        (container,) = self.services()[service]["containers"]
        found: dict[str, str | None] = {}
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                found |= self.of("ConfigMap")[source["configMapRef"]["name"]]["data"]
            elif (name := source["secretRef"]["name"]) in self.of("Secret"):
                found |= dict.fromkeys(self.of("Secret")[name]["data"])
        for variable in container.get("env", []):
            found[variable["name"]] = variable.get("value")
        return found


def copied(to: Path) -> Path:
    """Return a copy of `k8s/` with drawn passwords."""
    shutil.copytree(ROOT / "k8s", to, ignore=shutil.ignore_patterns("secrets", "__pycache__"))
    spec = importlib.util.spec_from_file_location("draw_secrets", to / "overlays/local/draw_secrets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.draw(to / "overlays/local/secrets")
    for name, (overlay, components) in COMBINED.items():
        folder = to / "overlays" / name
        folder.mkdir()
        lines = [
            "apiVersion: kustomize.config.k8s.io/v1beta1",
            "kind: Kustomization",
            "resources:",
            f"  - ../{overlay}",
        ]
        lines += ["components:", *(f"  - ../../components/{component}" for component in components)]
        (folder / "kustomization.yaml").write_text("\n".join(lines) + "\n")
    return to


def render(folder: Path, name: str) -> Rendered:
    """Render an overlay's manifests, without a cluster or network."""
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(folder / "overlays" / name)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return Rendered(name, done.stdout)
