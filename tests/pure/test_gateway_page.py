"""The page without a browser: its files, its policy, the documentation, and the feed of the fleet view."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import builders
import httpx
import pytest
from gateway_app import App
from gateway_peer import eventually
from page_server import MadeUpFleet, PacedApp, served
from pages import pages
from patience import HANG_S

from services.gateway.keys import new_key, render
from services.gateway.openapi import document
from services.gateway.page import documents, feed
from services.gateway.page.documents import INDEX, REFERENCE, ROOT, SECTIONS, Documents
from services.gateway.page.files import STATIC, static_files
from shared.errors import BrokersError
from shared.messages import Job
from shared.models.folder import ModelFolder

FILES = sorted(STATIC.iterdir())
HTML = (STATIC / "index.html").read_text()
FRAME = ("/", "/docs", "/openapi.json", "/page/icon.svg", "/page/page.css")
"""Links of every page."""
SCRIPTS = {path.name: path.read_text() for path in FILES if path.suffix == ".js"}


@pytest.fixture
async def app(folder: ModelFolder) -> AsyncIterator[PacedApp]:
    app = PacedApp(folder)
    yield app
    await app.http.aclose()


@pytest.fixture
async def guarded(folder: ModelFolder, tmp_path: Path) -> AsyncIterator[tuple[PacedApp, str]]:
    """An application with API keys, and a valid key."""
    text, key = new_key("tests", datetime.now(UTC))
    (tmp_path / "keys.json").write_text(render([key]))
    app = PacedApp(folder, api_keys_file=tmp_path / "keys.json")
    yield app, text
    await app.http.aclose()


async def client(app: PacedApp) -> httpx.AsyncClient:
    """A client of the application as it is now: `App.http` was made before the feed was added."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app.asgi), base_url="http://127.0.0.1:8000", timeout=HANG_S)


class Elements(HTMLParser):
    """The elements of a page: their names, and the attributes of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def values(self, *names: str) -> list[str]:
        return [attributes[name] for _, attributes in self.found for name in names if name in attributes]


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/page/page.css", "/page/icon.svg", "/docs/README.md"])
async def test_files_come_with_a_tag_and_a_policy_and_once(app: PacedApp, path: str) -> None:
    async with await client(app) as http:
        first = await http.get(path)
        assert (first.status_code, first.headers["cache-control"]) == (200, "no-cache")
        policy = first.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert first.headers["x-content-type-options"] == "nosniff"
        again = await http.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        weak = await http.get(path, headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
        assert weak.status_code == 304
        assert (await http.get(path, headers={"if-none-match": '"other"'})).status_code == 200
        head = await http.head(path)
        assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", first.headers["etag"])


@pytest.mark.parametrize("path", ["/page/gone.js", "/page/..%2f..%2fkeys.py", "/page/../keys.py", "/docs/gone.md"])
async def test_other_files_are_not_served(app: PacedApp, path: str) -> None:
    async with await client(app) as http:
        answer = await http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


async def test_a_browser_gets_a_page_for_an_unknown_document(app: PacedApp) -> None:
    async with await client(app) as http:
        answer = await http.get("/docs/<b>gone.md", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        assert (answer.status_code, answer.headers["content-type"]) == (404, "text/html; charset=utf-8")
        assert "<h1>Page not found</h1>" in answer.text
        assert "<b>" not in answer.text
        known = await http.get("/docs/README.md")
        assert Elements(answer.text).values("href") == Elements(known.text.partition("<main")[0]).values("href")


async def test_the_version_is_the_packages(app: PacedApp) -> None:
    async with await client(app) as http:
        assert re.fullmatch(r"\d+\.\d+.*", (await http.get("/version")).json()["version"])


def test_nothing_is_requested_from_elsewhere_and_nothing_is_inline() -> None:
    page = Elements(HTML)
    assert [value for value in page.values("href", "src") if not value.startswith(("/", "#"))] == []
    assert page.values("style", "onclick", "onload") == []
    assert [
        tag for tag, attributes in page.found if tag == "style" or (tag == "script" and "src" not in attributes)
    ] == []
    for path in FILES:
        if path.suffix in (".js", ".css", ".html"):
            text = path.read_text()
            assert re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}|@import|\burl\(", text) == [], path.name
            assert not re.search(
                r"innerHTML|outerHTML|document\.write|\beval\(|localStorage|sessionStorage|cookie", text
            )


def test_every_file_that_the_page_names_is_there() -> None:
    named = [
        value.removeprefix("/page/") for value in Elements(HTML).values("href", "src") if value.startswith("/page/")
    ]
    for text in SCRIPTS.values():
        named += re.findall(r'from "\./([\w.]+)"', text)
    assert set(named) <= static_files().keys()
    assert {path.name for path in FILES} == set(named) | {"index.html", "playground.png"}, "no file is left over"


def test_every_element_that_scripts_and_labels_name_is_there() -> None:
    page = Elements(HTML)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    named = {name for value in page.values("for", "aria-controls", "aria-labelledby") for name in value.split()}
    for text in SCRIPTS.values():
        named |= set(re.findall(r'\bby\("([\w-]+)"\)', text))
    assert named - set(ids) == set()


def test_every_control_has_a_name() -> None:
    labelled = set(Elements(HTML).values("for"))
    nameless = []
    for match in re.finditer(r"<(input|select|textarea)\b[^>]*?id=\"([\w-]+)\"", HTML):
        before = HTML[: match.start()]
        inside = before.rfind("<label") > before.rfind("</label>")
        if not inside and match[2] not in labelled:
            nameless.append(match[2])
    assert nameless == []


async def test_the_page_needs_no_key_and_all_that_it_asks_for_does(guarded: tuple[PacedApp, str]) -> None:
    app, key = guarded
    async with await client(app) as http:
        for path in ("/", "/page/app.js", "/docs", "/docs/README.md", "/openapi.json", "/version"):
            assert (await http.get(path)).status_code in (200, 307), path
        for path in ("/v1/models", "/fleet/events", "/page", "/fleet", "/docs2"):
            refused = await http.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert app.feed.viewers == 0
        assert (await http.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code == 200


async def test_without_keys_foreign_host_names_get_no_page_and_no_feed(app: PacedApp) -> None:
    async with await client(app) as http:
        for path in ("/", "/fleet/events"):
            assert (await http.get(path, headers={"host": "evil.example"})).status_code == 403


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({}, False),
        ({"sec-fetch-site": "same-origin"}, False),
        ({"sec-fetch-site": "cross-site"}, True),
        ({"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:3000"}, True),
        ({"origin": "https://evil.example"}, True),
        ({"origin": "null"}, True),
        ({"origin": "http://localhost"}, False),
    ],
)
async def test_pages_of_other_origins_cannot_hold_the_feed_open(
    app: PacedApp, headers: dict[str, str], refused: bool
) -> None:
    app.feed.closed = True
    async with await client(app) as http:
        answer = await http.get("/fleet/events", headers={"host": "localhost", **headers})
    assert answer.status_code == (403 if refused else 200)
    assert not refused or answer.json()["error"]["code"] == "origin_not_allowed"


async def test_every_page_of_the_repository_is_served(app: PacedApp) -> None:
    repository = {page.path.relative_to(ROOT).as_posix() for page in pages()}
    served = Documents()
    assert set(served.paths) == repository
    assert served.paths[0] == INDEX
    assert served.sections.keys() == SECTIONS.keys(), "each page has a section"
    assert {path for paths in SECTIONS.values() for path in paths} == repository | {REFERENCE}
    async with await client(app) as http:
        first = await http.get("/docs")
        assert (first.status_code, first.headers["location"]) == (307, "/docs/README.md")
        listed = Elements(first_page := (await http.get("/docs/README.md")).text).values("href")
        assert {f"/docs/{path}" for path in (*repository, REFERENCE)} <= set(listed), first_page


async def test_the_api_has_a_page_of_its_paths_options_and_errors(app: PacedApp) -> None:
    async with await client(app) as http:
        answer = await http.get(f"/docs/{REFERENCE}")
        described = (await http.get("/openapi.json")).json()
    assert answer.status_code == 200
    page = answer.text
    for path, operations in described["paths"].items():
        for method in operations.keys() - {"head"}:
            assert f"<code>{method.upper()} {path}</code></h3>" in page
    for name, schema in described["components"]["schemas"].items():
        assert f'<h3 id="{name.lower()}">{name}</h3>' in page
        assert [field for field in schema.get("properties", {}) if f"<td><code>{field}</code></td>" not in page] == []
    assert "number (at least 0, at most 2) or null" in page
    assert "try again after Retry-After seconds" in page


def test_an_installed_package_serves_no_pages_of_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("services", "shared", "docker", "k8s"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text("# A page")
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    assert set(Documents().paths) - {INDEX} == {"services/README.md", "shared/README.md"}
    (tmp_path / "pyproject.toml").touch()
    assert {"docker/README.md", "k8s/README.md"} <= set(Documents().paths)


def test_links_between_the_served_pages_lead_somewhere() -> None:
    served = Documents(described=lambda: document("1", keys=True))
    assert REFERENCE in served.paths
    made = {path: Elements((served.html(path) or b"").decode()) for path in served.paths}
    broken = []
    for path, page in made.items():
        for href in page.values("href"):
            target, _, anchor = href.partition("#")
            if target.startswith(("https://", "http://")) or target in FRAME:
                continue
            other = target.removeprefix("/docs/") or path
            if other not in made or (anchor and anchor not in made[other].values("id")):
                broken.append(f"{path}: {href}")
        pictures = [source for source in page.values("src") if source not in FRAME]
        broken += [f"{path}: {name}" for name in pictures if not served.picture(name.removeprefix("/docs/"))]
    assert broken == []


def test_a_page_shows_its_text_and_no_markup_of_its_own() -> None:
    text = "# A <b>title</b>\n\n<script>alert(1)</script>\n\n[x](javascript:alert(1)) [y](other.py) [z](b.md#one)\n"
    page = Documents({"a.md": text, "b.md": "# One"}).html("a.md")
    assert page is not None
    assert b"<script" not in page
    assert b"&lt;script&gt;" in page
    assert b"javascript:" not in page.replace(b"](javascript:", b"")
    assert b"<span>y</span>" in page
    assert b'<a href="/docs/b.md#one">z</a>' in page


def test_the_brand_is_in_each_title_once() -> None:
    made = Documents({"a.md": "# The engine", "README.md": "# WISP"})
    titles = [re.findall(r"<title>(.*)</title>", (made.html(path) or b"").decode()) for path in made.paths]
    assert titles == [["WISP"], ["The engine · WISP"]]


async def first_events(http: httpx.AsyncClient, count: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    async with http.stream("GET", "/fleet/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
            if len(found) == count:
                break
    return found


async def test_the_feed_works_while_somebody_looks_and_not_longer(folder: ModelFolder) -> None:
    app = PacedApp(folder, MadeUpFleet(batches_per_s=100))
    assert not app.feed.listening
    async with served(app) as url, httpx.AsyncClient(base_url=url, timeout=HANG_S) as http:
        first, *_, last = await first_events(http, 6)
        assert app.fleet.listeners == 1
        batches = [item for item in last["news"] if item["kind"] == "batch"]  # type: ignore[attr-defined]
        assert {batch["verifier"] for batch in batches} == {"verifier-0", "verifier-1"}
        assert batches[0]["jobs"][0]["verified"] == 3
        assert {"state", "connected"} <= first.keys()
        assert first["problem"] is None, "to connect takes a moment, and is no problem"
        await eventually(lambda: app.feed.viewers == 0)
        await eventually(lambda: app.fleet.listeners == 0)
        assert not app.feed.listening


async def test_two_viewers_share_one_connection(folder: ModelFolder) -> None:
    app = PacedApp(folder)
    async with served(app) as url, httpx.AsyncClient(base_url=url, timeout=HANG_S) as http:
        looking = [asyncio.create_task(first_events(http, 8)) for _ in range(3)]
        await eventually(lambda: app.feed.viewers == 3)
        assert all(len(events) == 8 for events in await asyncio.gather(*looking))
        assert app.fleet.connections == 1
        await eventually(lambda: app.fleet.listeners == 0)


async def test_too_many_viewers_are_refused(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "VIEWERS", 1)
    app = PacedApp(folder)
    async with app.feed.viewer() as events:
        assert "state" in await anext(events)
        async with await client(app) as http:
            refused = await http.get("/fleet/events")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_viewers")


async def test_a_feed_without_its_broker_gives_the_reason_and_recovers(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "RETRY_S", 0.01)
    app = PacedApp(folder)
    app.fleet.problem = BrokersError("RabbitMQ is away")
    async with app.feed.viewer() as events:
        async with asyncio.timeout(HANG_S):
            while (await anext(events)).get("problem") != "RabbitMQ is away":
                pass
            app.fleet.problem = None
            while not (await anext(events)).get("news"):
                pass


async def test_the_feed_ends_when_the_gateway_shuts_down(app: PacedApp) -> None:
    async with app.feed.viewer() as events:
        await anext(events)
        app.feed.closed = True
        assert [event async for event in events] == []


async def test_a_server_without_a_fleet_reports_it(folder: ModelFolder) -> None:
    app = App(folder)
    answer = await app.http.get("/fleet/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_fleet")
    await app.http.aclose()


async def test_a_trace_names_source_batch_and_verifier_of_each_round(folder: ModelFolder) -> None:
    app = PacedApp(folder)
    async with await client(app) as http:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        for trace in (True, False):
            answer = await http.post("/v1/chat/completions", json=body | {"wisp": {"trace": trace}})
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            rounds = [one for event in events for one in event.get("wisp", {}).get("rounds", [])]
            if not trace:
                assert rounds == []
                continue
            assert [one["sources"] for one in rounds] == [["lookup", "hidden"][n % 2 :][:1] * 4 for n in range(5)]
            assert [(one["batch"], one["verifier"]) for one in rounds] == [(f"b{n}", "peer") for n in range(5)]
    assert [generate.trace for generate in app.generated] == [True, False]


def test_a_rounds_sources_follow_its_draft_to_the_result() -> None:
    verify = builders.verify(draft=[1, 2, 3], sources=["lookup", "lookup", "hidden"])
    job = Job.of(verify, draft=2, prefill_to=None, queue_ms=0.0, slack_ms=None, reason="")
    assert job.sources == ["lookup", "lookup"]
