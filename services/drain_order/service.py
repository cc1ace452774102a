"""The drain order: reads the verifiers' heartbeats from Redis, and annotates their pods with deletion costs."""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.error
import urllib.request
from urllib.parse import quote

from services.drain_order.core.order import changes, deletion_costs
from services.drain_order.settings import DrainOrderSettings
from shared.errors import BrokersError, SettingsError, WispError
from shared.runtime import logging
from shared.runtime.health import HEALTH
from shared.runtime.service import running
from shared.runtime.settings import host_of
from shared.state.registry import Registry

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
"""When a Deployment scales in, Kubernetes removes pods with the lowest cost first; the default cost is 0."""
TIMEOUT_S = 5.0


class KubernetesError(WispError):
    """The Kubernetes API refused a request, or was unreachable."""


class Pods:
    """Writes deletion costs to the pods of one namespace."""

    def __init__(self, settings: DrainOrderSettings) -> None:
        """Raises SettingsError if the token or the certificate of the authority cannot be read."""
        self._url = f"{settings.kubernetes_url.rstrip('/')}/api/v1/namespaces/{quote(settings.pod_namespace)}/pods/"
        self._token_file = settings.kubernetes_token_file
        try:
            self._token()
            self._context = (
                ssl.create_default_context(cafile=str(settings.kubernetes_ca_file))
                if self._url.startswith("https:")
                else None
            )
        except OSError as error:
            raise SettingsError(
                f"{error}; Kubernetes mounts it into pods with automountServiceAccountToken. See "
                "WISP_KUBERNETES_TOKEN_FILE and WISP_KUBERNETES_CA_FILE"
            ) from error

    def _token(self) -> str:
        # Read for every request, since Kubernetes renews the file every hour.
        return self._token_file.read_text().strip()

    def annotate(self, pod: str, cost: int) -> bool:
        """Write a pod's cost, in a blocking call, and return whether the pod exists. Raises KubernetesError."""
        request = urllib.request.Request(
            self._url + quote(pod),
            json.dumps({"metadata": {"annotations": {ANNOTATION: str(cost)}}}).encode(),
            {"Content-Type": "application/merge-patch+json"},
            method="PATCH",
        )
        try:
            request.add_header("Authorization", f"Bearer {self._token()}")
            with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=self._context):
                return True
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return False
            text = error.read(500).decode(errors="replace")
            raise KubernetesError(f"Kubernetes refuses to annotate pod {pod}: {error.code} {text}") from error
        except OSError as error:
            raise KubernetesError(f"cannot annotate pod {pod}, since Kubernetes is unreachable: {error}") from error


async def serve(settings: DrainOrderSettings, instance: str, stop: asyncio.Event) -> None:
    """Keep the annotations of the verifiers' pods up to date until `stop` is set."""
    log = logging.get()
    pods = Pods(settings)
    registry = Registry.connect(settings.redis_url, settings.namespace, tls=settings.tls)
    published: dict[str, int] = {}

    async def update() -> None:
        costs = deletion_costs(await registry.heartbeats())
        wanted = {host_of("verifier", verifier_id): cost for verifier_id, cost in costs.items()}
        for pod in published.keys() - wanted.keys():
            del published[pod]
        for pod, cost in changes(wanted, published).items():
            if not await asyncio.to_thread(pods.annotate, pod, cost):
                log.debug("no such pod", pod=pod)  # a verifier outside the cluster
            published[pod] = cost

    async def watch() -> None:
        while True:
            try:
                await update()
            except (BrokersError, KubernetesError) as error:
                log.warning("the drain order may be out of date", error=str(error))
            await asyncio.sleep(settings.interval_s)

    try:
        HEALTH.watch(None, registry)
        log.info("ready", pods=settings.pod_namespace)
        async with running(stop, watch()):
            pass
    finally:
        await registry.close()
