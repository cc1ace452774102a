"""The drain order with a real Redis, and a server in place of the Kubernetes API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import builders
import pytest
from patience import HANG_S

from services.drain_order.service import ANNOTATION, KubernetesError, Pods, serve
from services.drain_order.settings import DrainOrderSettings
from shared.errors import SettingsError
from shared.state.store import Store

TOKEN = "a-token"


class FakeKubernetes(ThreadingHTTPServer):
    """A Kubernetes API with some pods; keeps the cost that each was annotated with."""

    daemon_threads = True

    def __init__(self, pods: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), FakeKubernetesHandler)
        self.costs: dict[str, str | None] = dict.fromkeys(pods)
        self.patches = 0
        self.broken = False


class FakeKubernetesHandler(BaseHTTPRequestHandler):
    server: FakeKubernetes

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *_, namespaces, namespace, pods, pod = self.path.split("/")
        assert (namespaces, namespace, pods) == ("namespaces", "serving", "pods")
        assert self.headers["Content-Type"] == "application/merge-patch+json"
        self.server.patches += 1
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 403
        elif self.server.broken:
            status = 500
        elif pod not in self.server.costs:
            status = 404
        else:
            status = 200
            self.server.costs[pod] = body["metadata"]["annotations"][ANNOTATION]
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def api() -> Iterator[FakeKubernetes]:
    server = FakeKubernetes(["pod-a", "pod-b"])
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(api: FakeKubernetes, redis_url: str, namespace: str, tmp_path: Path) -> DrainOrderSettings:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return DrainOrderSettings(
        redis_url=redis_url,
        namespace=namespace,
        kubernetes_url=f"http://127.0.0.1:{api.server_port}",
        kubernetes_token_file=tmp_path / "token",
        pod_namespace="serving",
        interval_s=0.05,
    )


@pytest.fixture
async def store(redis_url: str, namespace: str) -> AsyncIterator[Store]:
    store = Store.connect(redis_url, namespace, 60)
    yield store
    await store.close()


async def beat(store: Store, pod: str, held: int) -> None:
    await store.registry.beat(builders.heartbeat(f"verifier-{pod}-a1b2c3", free_tokens=10_000 - held))


@pytest.fixture
async def serving(settings: DrainOrderSettings) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(serve(settings, "drainorder-1", stop))
    yield
    stop.set()
    await asyncio.wait_for(task, HANG_S)


async def until(api: FakeKubernetes, costs: dict[str, str | None]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(HANG_S):
            while api.costs != costs:  # noqa: ASYNC110 - another thread writes them
                await asyncio.sleep(0.02)
    assert api.costs == costs


async def test_pods_are_annotated_with_costs_and_again_when_these_change(
    api: FakeKubernetes, store: Store, serving: None
) -> None:
    await beat(store, "pod-a", 5000)
    await beat(store, "pod-b", 0)
    await beat(store, "elsewhere", 100)
    await until(api, {"pod-a": "13", "pod-b": "0"})
    async with asyncio.timeout(HANG_S):
        while api.patches < 3:  # noqa: ASYNC110 - the third is refused, as there is no pod of that name
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.3)
    assert api.patches == 3, "nothing changed, so nothing is written"
    await beat(store, "pod-b", 9000)
    await until(api, {"pod-a": "13", "pod-b": "14"})


async def test_the_service_survives_an_outage_of_kubernetes(api: FakeKubernetes, store: Store, serving: None) -> None:
    api.broken = True
    await beat(store, "pod-a", 5000)
    while not api.patches:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    api.broken = False
    await beat(store, "pod-a", 5000)
    await until(api, {"pod-a": "13", "pod-b": None})


async def test_an_invalid_token_is_reported(settings: DrainOrderSettings) -> None:
    settings.kubernetes_token_file.write_text("another")
    with pytest.raises(KubernetesError, match="refuses to annotate pod pod-a: 403"):
        await asyncio.to_thread(Pods(settings).annotate, "pod-a", 1)


def test_a_missing_token_stops_the_start(settings: DrainOrderSettings) -> None:
    settings.kubernetes_token_file.unlink()
    with pytest.raises(SettingsError, match="automountServiceAccountToken"):
        Pods(settings)
