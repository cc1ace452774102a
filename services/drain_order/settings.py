"""Settings of the drain order."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from shared.runtime.settings import ServiceSettings

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes mounts what a pod needs to call it."""


class DrainOrderSettings(ServiceSettings):
    """One process in a Kubernetes cluster. It needs Redis, and leave to annotate the verifiers' pods."""

    kubernetes_url: str = Field(
        "https://kubernetes.default.svc", pattern=r"^https?://", description="address of Kubernetes' API"
    )
    kubernetes_token_file: Path = Field(ACCOUNT / "token", description="file of the service account's token")
    kubernetes_ca_file: Path = Field(ACCOUNT / "ca.crt", description="authority (PEM) of the API's certificate")
    pod_namespace: str = Field("wisp", description="Kubernetes namespace of the verifiers' pods")
    interval_s: float = Field(5.0, gt=0, description="seconds between two looks at what the verifiers hold")
