"""The page in headless Chromium: what a person sees and does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import chromium
import pytest
from chromium import BrowserPage
from gateway_peer import eventually
from page_server import MadeUpFleet, PacedApp, served

from services.gateway.app import create_app
from services.gateway.core.admission import Unreachable
from services.gateway.keys import new_key, render
from shared.broker.incoming import Handler
from shared.messages import Generate
from shared.models.folder import ModelFolder

pytestmark = [
    pytest.mark.slow,  # it starts a browser
    pytest.mark.skipif(chromium.path() is None, reason="no Chromium: `apt-get install chromium`"),
]

DESKTOP, PHONE = (1280, 860), (360, 740)
TEXT = "Hello there, world."
ANSWER = "#conversation .made:last-of-type .answer"
MOST_FRAME_MS = 50.0
"""Median time of a frame of the fleet view: twice that of 40 frames per second, for a machine with other work."""
READABLE = 4.5
"""Contrast of text that WCAG asks for."""


@pytest.fixture(scope="module")
async def tab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[BrowserPage]:
    async with chromium.browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
async def page(tab: BrowserPage) -> AsyncIterator[BrowserPage]:
    """The tab, which must have had no problem by the end, and must have asked nobody but the gateway."""
    tab.log.clear()
    await tab.look(*DESKTOP)
    yield tab
    assert tab.problems() == []
    assert [url for url in tab.requested() if not url.startswith(("http://127.0.0.1:", "about:"))] == []
    await tab.open("about:blank")


@pytest.fixture
async def app(folder: ModelFolder) -> AsyncIterator[PacedApp]:
    app = PacedApp(folder)
    yield app
    await app.http.aclose()


async def ask(page: BrowserPage, text: str = "Hi") -> None:
    await page.click("#message")
    await page.type(text)
    await page.press("Enter")


async def answered(page: BrowserPage) -> str:
    """Wait for the end of the answer, and return it as it is seen."""
    await page.wait(
        "!document.querySelector('#send').hidden && document.querySelector('.made .status').innerText !== ''"
    )
    return await page.text(ANSWER)


async def origins(page: BrowserPage, answer: str = ANSWER) -> list[str]:
    """The origins of an answer's tokens, as the looks of their elements."""
    return list(
        await page.run(f"[...document.querySelectorAll({json.dumps(answer + ' .t')})].map(t => t.classList[1])")
    )


async def test_a_chat_shows_each_tokens_origin(page: BrowserPage, app: PacedApp) -> None:
    app.script = replace(app.script, rejected=0)
    async with served(app) as url:
        await page.open(f"{url}/")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        await ask(page)
        assert await answered(page) == TEXT
        seen = await origins(page)
        rounds = [(["lookup"] * 3, ["hidden"] * 3)[n % 2] + ["bonus"] for n in range(4)] + [["lookup"] * 3]
        assert seen == [origin for one in rounds for origin in one]
        counters = await page.text("#counters")
        assert "100 %" in counters
        assert "19 tokens" in counters
        assert f"{len(app.generated)} of" not in counters
        assert "lookup 9" in await page.text("#mix-legend")
        assert "19 tokens in" in await page.text(".made .status")


async def test_copies_of_a_run_are_told_from_drafts(page: BrowserPage, app: PacedApp) -> None:
    chunk = {
        "choices": [{"delta": {"content": "abcd"}}],
        "wisp": {
            "tokens": [{"id": n, "text": "abcd"[n], "draft": n in (0, 2)} for n in range(4)],
            "rounds": [
                {
                    "round": 0,
                    "start": 0,
                    "tokens": 2,
                    "drafted": 1,
                    "verified": 1,
                    "accepted": 1,
                    "sources": ["lookup"],
                },
                {"round": 1, "start": 2, "tokens": 2, "run": True, "verified": 0, "accepted": 0},
            ],
        },
    }
    async with served(app) as url:
        await page.open(f"{url}/")
        script = f"""Promise.all(["origin", "answer"].map((name) => import(`/page/${{name}}.js`))).then(([o, a]) => {{
            const record = new o.AnswerRecord(0);
            record.add({json.dumps(chunk)}, 1);
            return [record.mix(), a.counterRows(record).map((row) => row[2]), o.about(record.tokens[2])[0]];
        }})"""
        mix, notes, about = await page.run(script)
        assert mix == {"lookup": 1, "bonus": 1, "copy": 1, "run": 1}
        assert "1 of 1" in notes
        assert "2 tokens in runs, 1 copied" in notes
        assert about.startswith("a copy of earlier text")


async def test_a_promise_that_cannot_be_kept_is_told_in_words(page: BrowserPage, app: PacedApp) -> None:
    header = str(Unreachable(least_ttft_ms=941.8, least_tpot_ms=28.2))
    async with served(app) as url:
        await page.open(f"{url}/")
        script = f"""import('/page/origin.js').then((origin) =>
            [{json.dumps(header)}, "best-effort", null].map(origin.unkept))"""
        assert await page.run(script) == [
            "best effort: no verifier can keep this promise (shortest: 941.8 ms to the first token, 28.2 ms per token)",
            "best effort: no verifier can keep this promise",
            "",
        ]


async def test_pointing_at_a_token_shows_its_round(page: BrowserPage, app: PacedApp) -> None:
    async with served(app) as url:
        await page.open(f"{url}/")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        await ask(page)
        await answered(page)
        await page.click(f"{ANSWER} .t:nth-child(6)")
        card = await page.text("#token-card")
        assert "accepted draft, from hidden states" in card
        assert "Round 1, token 2 of 4; position 6 of the answer" in card
        assert "Batch b1 on peer" in card
        assert "5 drafted, 4 verified, 3 accepted, 1 trimmed by the scheduler" in card
        assert "0.8 ms verifying" in card
        await page.press("Escape")
        assert await page.text("#token-card") == ""
        await page.press("Home")
        await page.press("ArrowRight")
        await page.wait("document.querySelector('#announce').innerText.includes('Round 0, token 2 of 4')")
        assert await page.run(f"document.querySelectorAll('{ANSWER} .current').length") == 1
        assert "from prompt lookup" in await page.wait("document.querySelector('#token-card').innerText")


async def test_stop_and_escape_end_an_answer_and_clear_forgets_it(page: BrowserPage, app: PacedApp) -> None:
    app.pause_s = 0.5
    async with served(app) as url:
        await page.open(f"{url}/")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        for number, stop in enumerate((lambda: page.click("#stop"), lambda: page.press("Escape")), start=1):
            await ask(page)
            await page.wait(f"document.querySelector({json.dumps(ANSWER)}).innerText.length")
            await stop()
            await page.wait("[...document.querySelectorAll('.status')].at(-1).innerText === 'stopped'")
            await eventually(lambda expected=number: len(app.services.cancelled) == expected)
        await ask(page)
        await page.wait(f"document.querySelector({json.dumps(ANSWER)}).innerText.length")
        await page.click("#clear")
        await page.wait("!document.querySelector('.made') && !document.querySelector('#welcome').hidden")
        await eventually(lambda: len(app.services.cancelled) == 3)
        await page.wait("!document.querySelector('#send').hidden")
        await page.run("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        assert await page.run("document.querySelector('#mix-legend').childElementCount") == 0
        await ask(page)
        await eventually(lambda: len(app.generated) == 4)
        assert app.generated[3].prompt == app.generated[0].prompt, "the prompt has none of the cleared conversation"
        await page.click("#stop")
        await page.wait("!document.querySelector('#send').hidden")


async def test_a_conversation_goes_on_with_its_earlier_turns(page: BrowserPage, app: PacedApp) -> None:
    async with served(app) as url:
        await page.open(f"{url}/")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        await ask(page, "one")
        await answered(page)
        await ask(page, "two")
        await page.wait("document.querySelectorAll('.made').length === 2")
        await answered(page)
        await eventually(lambda: len(app.generated) == 2)
        first, second = (app.tokenizer.decode(generate.prompt) for generate in app.generated)
        assert "one" in first
        assert second.index("one") < second.index(TEXT) < second.index("two")


async def test_options_are_sent_and_shown_as_code(page: BrowserPage, app: PacedApp) -> None:
    async with served(app) as url:
        await page.open(f"{url}/")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        await page.wait("document.querySelector('#logprobs').checkVisibility()")  # nothing moves any more
        await page.run(
            "for (const [id, value] of Object.entries({temperature: '0.5', seed: '42', 'max-tokens': '7', tier: 'own',"
            "'slo-ttft': '900', 'slo-tpot': '80', draft: 'none', system: \"it's\"})) {"
            "const one = document.getElementById(id); one.value = value;"
            "one.dispatchEvent(new Event('input', {bubbles: true})); }"
        )
        await page.click("#code summary")
        code = await page.wait(
            "document.querySelector('#snippet').innerText.includes('x-slo-ttft-ms: 900') && "
            "document.querySelector('#snippet').innerText"
        )
        assert code.startswith(f"curl -N {url}/v1/chat/completions")
        assert '"seed": 42' in code
        assert "it'\\''s" in code
        await page.click("#code-python")
        python = await page.wait(
            "document.querySelector('#snippet').innerText.startsWith('from openai') && "
            "document.querySelector('#snippet').innerText"
        )
        compile(python, "snippet", "exec")
        assert 'extra_headers={"x-slo-ttft-ms": "900", "x-slo-tpot-ms": "80"}' in python
        await ask(page)
        assert await answered(page) == TEXT[:7]
        (generate,) = app.generated
        assert (generate.sampling.seed, generate.sampling.temperature, generate.max_tokens) == (42, 0.5, 7)
        assert (generate.draft, generate.slo and generate.slo.ttft_ms) == ("none", 900.0)
        assert "within 900 ms" in await page.text("#counters")
        assert "cut at the token limit" in await page.text(".made .status")


async def test_the_code_is_that_of_the_answer_shown(page: BrowserPage, app: PacedApp) -> None:
    shown = "document.querySelector('#snippet').textContent"
    async with served(app) as url:
        await page.open(f"{url}/")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        await page.click("#code summary")
        await ask(page, "first question")
        await answered(page)
        await page.run("document.querySelector('#temperature').value = '1.9'")
        await page.type("another one")
        await page.wait("document.querySelector('#code-title').innerText.startsWith('The last answer')")
        code = await page.run(shown)
        assert '"first question"' in code
        assert '"temperature": 0.2' in code
        assert TEXT not in code, "the answer is no part of its own request"
        assert "another one" not in code
        await page.press("Enter")
        await page.wait("document.querySelectorAll('.made').length === 2")
        await answered(page)
        code = await page.run(shown)
        assert code.index("first question") < code.index(TEXT) < code.index("another one")
        assert '"temperature": 1.9' in code
        await page.click("#clear")
        await page.wait(
            f"document.querySelector('#code-title').innerText === 'This request as code' && !{shown}.includes('first')"
        )


async def test_log_probabilities_are_shown_where_they_are_asked_for(page: BrowserPage, app: PacedApp) -> None:
    async with served(app) as url:
        await page.open(f"{url}/")
        await page.wait("document.querySelector('#logprobs').checkVisibility()")
        await page.click("#logprobs")
        await ask(page)
        await answered(page)
        await page.click(f"{ANSWER} .t:nth-child(2)")
        assert "log-probability -2.750 (6.4 %)" in await page.text("#token-card")


async def test_an_error_is_shown_and_the_question_kept(page: BrowserPage, app: PacedApp) -> None:
    async with served(app) as url:
        await page.open(f"{url}/")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        app.upstream.verifiers = False
        await ask(page, "Where are you?")
        problem = await page.wait("document.querySelector('.made .problem:not([hidden])').innerText")
        assert "503 unavailable: no verifier is running" in problem
        assert "Try again in 1 s." in problem
        assert "(request req_" in problem
        assert await page.run("document.querySelector('#message').value") == "Where are you?"
        app.upstream.verifiers = True
        await page.press("Enter")
        await page.wait(f"document.querySelector({json.dumps(ANSWER)}).innerText === {json.dumps(TEXT)}")


async def test_the_page_asks_for_the_key_and_stores_it_nowhere(
    page: BrowserPage, folder: ModelFolder, tmp_path: Path
) -> None:
    text, key = new_key("tests", datetime.now(UTC))
    (tmp_path / "keys.json").write_text(render([key]))
    app = PacedApp(folder, api_keys_file=tmp_path / "keys.json")
    async with served(app) as url:
        await page.open(f"{url}/")
        await page.wait("document.querySelector('#key-dialog').open")
        await page.type("wisp-nonsense")
        await page.press("Enter")
        await page.wait("document.querySelector('#key-problem').innerText.includes('Incorrect API key')")
        await page.type(text)
        await page.press("Enter")
        await page.wait("!document.querySelector('#key-dialog').open")
        await ask(page)
        assert await answered(page) == TEXT
        stored = "JSON.stringify([localStorage, sessionStorage, document.cookie, document.body.outerHTML])"
        assert text not in await page.run(stored)
        assert "$WISP_API_KEY" in await page.run("document.querySelector('#snippet').textContent")
        await page.click("#tab-fleet")
        await page.wait("document.querySelectorAll('#batches tbody tr').length")
    await app.http.aclose()


@pytest.mark.parametrize("together", [False, True])
async def test_a_comparison_reports_equal_texts(page: BrowserPage, app: PacedApp, together: bool) -> None:
    async with served(app) as url:
        await page.open(f"{url}/#compare")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        if together:
            await page.click("#compare-together")
        await page.click("#compare-run")
        assert "Identical: the same 19 tokens." in await page.wait("document.querySelector('#verdict .good').innerText")
        assert "times as fast with drafts" in await page.text("#verdict")
        assert await page.text("#with-answer") == await page.text("#without-answer") == TEXT
        assert set(await origins(page, "#with-answer")) == {"lookup", "hidden", "own"}
        assert set(await origins(page, "#without-answer")) == {"own"}
        assert {(generate.draft, generate.sampling.seed) for generate in app.generated} == {("auto", 7), ("none", 7)}


async def test_a_comparison_shows_a_loss_as_no_win(page: BrowserPage, folder: ModelFolder) -> None:
    class Slow(PacedApp):
        async def _answer(self, generate: Generate) -> None:
            self.pause_s = 0.001 if generate.draft == "none" else 0.1
            await super()._answer(generate)

    app = Slow(folder)
    async with served(app) as url:
        await page.open(f"{url}/#compare")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        await page.click("#compare-run")
        assert "times as slow with drafts" in await page.wait("document.querySelector('#verdict .bad').innerText")
        assert await page.text("#verdict .good") == "Identical: the same 19 tokens."
    await app.http.aclose()


async def test_a_comparison_leaves_out_the_time_to_the_first_token(page: BrowserPage, folder: ModelFolder) -> None:
    """The first request computes the prompt; the second one finds it cached."""

    class LongPrompt(PacedApp):
        async def _answer(self, generate: Generate) -> None:
            self.pause_s = 0.05 if generate.draft == "none" else 0.001
            if generate.draft != "none":
                await asyncio.sleep(2)
            await super()._answer(generate)

    app = LongPrompt(folder)
    async with served(app) as url:
        await page.open(f"{url}/#compare")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        await page.click("#compare-run")
        await page.wait("document.querySelector('#verdict .good') !== null")
        assert "times as fast with drafts" in await page.text("#verdict")
    await app.http.aclose()


async def test_a_comparison_names_the_first_difference(page: BrowserPage, folder: ModelFolder) -> None:
    class Wrong(PacedApp):
        async def _answer(self, generate: Generate) -> None:
            self.script = replace(self.script, text="Hello where?" if generate.draft == "none" else TEXT)
            await super()._answer(generate)

    app = Wrong(folder)
    async with served(app) as url:
        await page.open(f"{url}/#compare")
        await page.wait("document.querySelector('#model').innerText === 'tiny'")
        await page.click("#compare-run")
        verdict = await page.wait("document.querySelector('#verdict.bad').innerText")
        assert 'Not identical: they differ from token 7 on: "t" and "w"' in verdict
    await app.http.aclose()


async def test_the_fleet_view_leads_from_a_batch_to_a_sessions_rounds(page: BrowserPage, app: PacedApp) -> None:
    async with served(app) as url:
        await page.open(f"{url}/#fleet")
        await page.wait("document.querySelectorAll('#batches tbody tr').length >= 5")
        for table, words in (
            ("#verifiers", ("verifier-0", "verifier-1", "alive", "38 % of 10,000", "1.02")),
            ("#drafters", ("drafter-0", "pool", "12 of 64", "stands in")),
            ("#classes", ("default", "priority", "4.5 ms", "−6.0 ms", "38 ms")),
        ):
            shown = await page.text(table)
            assert [word for word in words if word not in shown] == []
        assert "policy wisp" in await page.text("#fleet-counters")
        for place, word in (("#fleet-counters [title]", "verifiers' time"), ("#drafters abbr", "no drafter serves")):
            assert word in await page.run(f"document.querySelector('{place}').title")
        await page.click("#words summary")
        explained = await page.text("#words")
        for word in ("Promised share", "stands in", "conflict", "trimmed", "run", "Least slack"):
            assert f"{word}\n" in explained
        await page.click("#words summary")
        await page.click("#pause")
        await page.click("#batches tbody tr:nth-child(2) .pick")
        await page.wait("document.querySelector('#detail-title').innerText.startsWith('Batch batch-')")
        assert "2 of 3 accepted, 1 trimmed" in await page.text("#detail-body")
        await page.click("#detail-body .pick")
        title = await page.wait(
            "document.querySelector('#detail-title').innerText.startsWith('Session ') && "
            "document.querySelector('#detail-title').innerText"
        )
        assert title.removeprefix("Session ") in [f"{session:06x}" for session in range(12)]
        assert "2 of 3 accepted" in await page.text("#detail-body")
        await page.click("#pause")
        await choose_in_timeline(page)
        assert app.feed.viewers == 1
        await page.click("#tab-chat")
        await eventually(lambda: app.feed.viewers == 0)


async def test_the_fleet_view_claims_nothing_before_it_is_connected(page: BrowserPage, folder: ModelFolder) -> None:
    class Connecting(MadeUpFleet):
        async def listen(self, receive: Handler, listening: Callable[[], None]) -> None:
            await reached.wait()
            await super().listen(receive, listening)

    reached = asyncio.Event()
    app = PacedApp(folder, Connecting())
    async with served(app) as url:
        await page.open(f"{url}/#fleet")
        shown = await page.wait("document.querySelector('#fleet-counters').innerText")
        assert "not connected" in shown
        assert "scheduler" not in shown
        reached.set()
        await page.wait("document.querySelector('#fleet-counters').innerText.includes('policy wisp')")
    await app.http.aclose()


async def choose_in_timeline(page: BrowserPage) -> None:
    """Click the lane of the first verifier at several places: between two batches there is nothing to choose."""
    box = await page.run(
        "(() => { const c = document.querySelector('#timeline'); c.scrollIntoView({block: 'center'});"
        "const b = c.getBoundingClientRect(); return [b.left + b.width, b.top + 17]; })()"
    )
    for before in (50, 80, 110, 140, 170):
        await page.click_at(box[0] - before, box[1])
        if (await page.text("#detail-title")).startswith("Batch batch-"):
            return
    raise AssertionError("no batch was chosen")


async def test_the_fleet_view_of_a_baseline_says_that_there_is_no_fleet(page: BrowserPage, app: PacedApp) -> None:
    app.asgi = create_app(replace(app.gateway, feed=None))
    async with served(app) as url:
        await page.open(f"{url}/#fleet")
        await page.wait("document.querySelector('#fleet-note').innerText.includes('This server is a baseline')")
        assert await page.run("document.querySelector('#fleet-note').className") == "note"
        page.log.clear()  # the browser reports every answer of 404


async def test_tabs_obey_the_arrow_keys(page: BrowserPage, app: PacedApp) -> None:
    async with served(app) as url:
        await page.open(f"{url}/")
        await page.run("document.querySelector('#tab-chat').focus()")
        for view in ("compare", "fleet", "chat"):
            await page.press("ArrowRight")
            await page.wait(f"!document.querySelector('#view-{view}').hidden")
            assert await page.run("document.activeElement.id") == f"tab-{view}"
            assert await page.run("[...document.querySelectorAll('.view')].filter(one => !one.hidden).length") == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_nothing_overflows_a_phone_and_text_is_readable(page: BrowserPage, app: PacedApp, theme: str) -> None:
    async with served(app) as url:
        await page.look(*PHONE, theme)
        await page.open(f"{url}/")
        await page.wait("document.querySelector('#model').textContent === 'tiny'")
        await ask(page)
        await answered(page)
        for view in ("chat", "compare", "fleet"):
            await page.click(f"#tab-{view}")
            if view == "fleet":
                await page.wait("document.querySelectorAll('#batches tbody tr').length >= 5")
                await page.click("#pause")  # rows move on, and with them what a click meets
                await page.click("#batches .pick")
                await page.wait("document.querySelector('#detail-body table') !== null")
                assert await page.run(CUT_OFF) == []
            assert await page.run("document.documentElement.scrollWidth") <= PHONE[0], view
            assert await page.run(CONTRASTS) == [], view
        await page.open(f"{url}/docs/services/gateway/README.md")
        assert await page.run("document.documentElement.scrollWidth") <= PHONE[0]
        assert await page.run(CONTRASTS) == []


async def test_code_of_the_documentation_is_read_without_scrolling(page: BrowserPage, app: PacedApp) -> None:
    async with served(app) as url:
        await page.open(f"{url}/docs/README.md")
        assert await page.run("document.title") == "WISP"
        assert await page.run("document.querySelectorAll('.text pre').length") > 3
        cut = "[...document.querySelectorAll('.text pre')].filter((one) => one.scrollWidth > one.clientWidth).length"
        assert await page.run(cut) == 0


CUT_OFF = """[...document.querySelectorAll('#view-fleet .scroll')].filter(one => one.scrollWidth > one.clientWidth)
  .map(one => one.innerText)"""
"""Tables of which a part is seen only after scrolling."""
CONTRASTS = (
    """(() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const c = parse(getComputedStyle(one).backgroundColor);
      if (c[3] === 1) return c;
    }
    return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 20, 24, 1] : [255, 255, 255, 1];
  };
  const bad = new Set();
  for (const one of document.querySelectorAll('body *')) {
    if (!one.checkVisibility() || ![...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < READABLE) bad.add(`${one.tagName}.${one.className}: ${ratio.toFixed(2)}`);
  }
  return [...bad];
})()"""
).replace("READABLE", str(READABLE))


TIMELINE = "document.querySelector('#timeline').toDataURL()"
MEASURE_FRAMES = """(() => {
  window.frameTimes = [];
  let before = null;
  const measure = (at) => {
    if (before !== null) window.frameTimes.push(at - before);
    before = at;
    requestAnimationFrame(measure);
  };
  requestAnimationFrame(measure);
})()"""


async def test_fifty_sessions_and_two_hundred_batches_a_second_are_smooth(
    page: BrowserPage, folder: ModelFolder, record_property: pytest.RecordProperty
) -> None:
    app = PacedApp(folder, MadeUpFleet(batches_per_s=200, sessions=50, verifiers=4, jobs=8))
    async with served(app) as url:
        await page.open(f"{url}/#fleet")
        await page.wait("document.querySelectorAll('#batches tbody tr').length")
        drawn = await page.run(TIMELINE)
        await page.run(MEASURE_FRAMES)
        times = await page.wait("window.frameTimes.length >= 150 && window.frameTimes", within_s=60)
        assert await page.run(TIMELINE) != drawn, "the timeline moves"
        ordered = sorted(times)
        summary = {"median": median(ordered), "p95": ordered[int(0.95 * len(ordered))], "longest": ordered[-1]}
        record_property("frame_ms", {name: round(value, 1) for name, value in summary.items()})
        assert summary["median"] < MOST_FRAME_MS, summary
        memory = await page.run("document.querySelectorAll('*').length")
        assert memory < 2000, "the page grows"
    await app.http.aclose()
