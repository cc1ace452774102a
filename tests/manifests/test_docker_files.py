"""The files of `docker/` without a build; `make images-test` builds and runs the images."""

from __future__ import annotations

import re
import subprocess
import tomllib
from typing import Any

import pytest
import yaml
from kustomized import ROOT, tool

from services.tools.cli.environment import settings_of
from shared.runtime.settings import variable

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
DOCKERFILES = sorted((ROOT / "docker").glob("*Dockerfile"))
COMPOSE = ROOT / "docker/compose.yaml"
SERVICES = ("gateway", "drafter", "scheduler", "estimator", "verifier")


def compose() -> dict[str, Any]:
    """The compose file."""
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_dockerfile_passes_hadolint(file: Any) -> None:
    done = subprocess.run([tool("hadolint"), str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_dockerfile_names_its_base_once_by_version(file: Any) -> None:
    text = file.read_text()
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert re.search(r":\d+\.\d+(\.\d+)?-", base), base
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", text, re.MULTILINE)
    known = {name for _, name in stages}
    assert {source for source, _ in stages} <= known | {"${BASE}"}


def test_the_cuda_image_can_compile_kernels_and_keep_them() -> None:
    """Triton needs a C compiler, and a folder that can be written although the image cannot."""
    text = (ROOT / "docker/Dockerfile").read_text()
    (cuda,) = [stage for stage in text.split("\nFROM ") if stage.startswith("runtime AS cuda\n")]
    assert re.search(r"apt-get install .*\bgcc\b", cuda)
    (cache,) = re.findall(r"^ENV TRITON_CACHE_DIR=(\S+)$", cuda, re.MULTILINE)
    pod = yaml.safe_load((ROOT / "k8s/pod/pod.yaml").read_text())["spec"]["template"]["spec"]
    written = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] in written]
    assert any(cache.startswith(f"{mount}/") for mount in mounts)


def test_hadolint_would_notice(tmp_path: Any) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp\n")
    assert subprocess.run([tool("hadolint"), str(bad)], capture_output=True, check=False).returncode != 0


def test_the_images_run_without_root_and_prove_their_consumers() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    runtime = text[text.index(" AS runtime") :]
    users = [re.findall(r"^USER (\S+)$", stage, re.MULTILINE) for stage in runtime.split("\nFROM ")]
    assert users[0]  # of the stage that the images begin from
    assert {names[-1] for names in users if names} == {"10001:10001"}
    assert '"python", "-m", "shared.runtime.health"' in runtime
    assert "org.opencontainers.image.base.name" in runtime


@pytest.mark.parametrize("script", sorted((ROOT / "docker").glob("*.sh")), ids=lambda file: file.name)
def test_scripts_are_bash(script: Any) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_build_says_what_there_is() -> None:
    done = subprocess.run(
        [ROOT / "docker/build.sh", "nothing"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2
    assert "the images are services, cpu and cuda" in done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "docker").glob("compose*.yaml")), ids=lambda file: file.name)
def test_a_compose_file_passes_its_schema(file: Any) -> None:
    schema = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(file)]
    done = subprocess.run(schema, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_uses_existing_settings_and_pinned_images() -> None:
    services = compose()["services"]
    for name in SERVICES:
        known = {variable(field) for field in settings_of(name).model_fields} | {"OTEL_EXPORTER_OTLP_ENDPOINT"}
        assert services[name]["environment"].keys() <= known, name
        assert services[name]["command"] == ["python", "-m", f"services.{name}"]
    for name, service in services.items():
        default = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service["image"])
        assert re.search(r":\d+\.\d+\.\d+$", default), name
        if "wisp-" in default:
            assert default.endswith(f":{VERSION}")
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_the_compose_file_of_keys_sets_settings_that_there_are() -> None:
    services = yaml.safe_load((ROOT / "docker/compose.keys.yaml").read_text())["services"]
    assert services.keys() == {"gateway"}
    known = {variable(field) for field in settings_of("gateway").model_fields}
    assert services["gateway"]["environment"].keys() <= known


def test_the_compose_file_opens_the_api_alone_and_on_loopback() -> None:
    ports = {name: service["ports"] for name, service in compose()["services"].items() if "ports" in service}
    assert ports == {"gateway": ["${WISP_API:-127.0.0.1:8000}:8000"]}
