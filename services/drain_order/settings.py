"""Settings of the drain order."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from shared.runtime.settings import ProcessSettings, RedisSettings

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Folder in which Kubernetes mounts a pod's service account."""


class DrainOrderSettings(ProcessSettings, RedisSettings):
    """One process in a Kubernetes cluster. It needs Redis, and permission to annotate the verifiers' pods."""

    kubernetes_url: str = Field(
        "https://kubernetes.default.svc", pattern=r"^https?://", description="address of the Kubernetes API"
    )
    kubernetes_token_file: Path = Field(ACCOUNT / "token", description="file with the service account's token")
    kubernetes_ca_file: Path = Field(
        ACCOUNT / "ca.crt", description="authority (PEM) that the API's certificate is checked against"
    )
    pod_namespace: str = Field("wisp", description="Kubernetes namespace of the verifiers' pods")
    interval_s: float = Field(5.0, gt=0, description="seconds between two updates of the annotations")
