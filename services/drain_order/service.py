"""The loop: heartbeats from Redis in, annotations of pods out."""

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
from shared.state.store import Store

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
"""When a Deployment gets smaller, pods with the lowest cost go first; without the annotation it is 0."""
TIMEOUT_S = 5.0


class KubernetesError(WispError):
    """Kubernetes' API did not do what it was asked."""


class Pods:
    """The pods of one namespace, as far as they are annotated here."""

    def __init__(self, settings: DrainOrderSettings) -> None:
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
                f"{error}; it is mounted into pods with automountServiceAccountToken. See WISP_KUBERNETES_TOKEN_FILE "
                "and WISP_KUBERNETES_CA_FILE"
            ) from error

    def _token(self) -> str:
        # Kubernetes renews the file every hour.
        return self._token_file.read_text().strip()

    def annotate(self, pod: str, cost: int) -> bool:
        """Tell a pod's cost, in a blocking call; returns whether there is such a pod. Raises KubernetesError."""
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
            raise KubernetesError(f"Kubernetes cannot be asked to annotate pod {pod}: {error}") from error


async def serve(settings: DrainOrderSettings, instance: str, stop: asyncio.Event) -> None:
    """Keep the annotations of the verifiers' pods as they should be, until `stop`."""
    log = logging.get()
    pods = Pods(settings)
    store = Store.connect(settings.redis_url, settings.namespace, settings.session_ttl_s, settings.tls)
    told: dict[str, int] = {}

    async def look() -> None:
        wanted = deletion_costs(await store.heartbeats())
        for pod in told.keys() - wanted.keys():
            del told[pod]
        for pod, cost in changes(wanted, told).items():
            if not await asyncio.to_thread(pods.annotate, pod, cost):
                log.debug("no such pod", pod=pod)  # a verifier outside the cluster
            told[pod] = cost

    async def watch() -> None:
        while True:
            try:
                await look()
            except (BrokersError, KubernetesError) as error:
                log.warning("the drain order may be old", error=str(error))
            await asyncio.sleep(settings.interval_s)

    try:
        HEALTH.watch(None, store)
        log.info("ready", pods=settings.pod_namespace)
        async with running(stop, watch()):
            pass
    finally:
        await store.close()
