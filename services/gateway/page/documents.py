"""The pages of the repository as HTML: those that are installed with the packages, and the README of the project."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from services.gateway.page.reference import TITLE, reference

ROOT = Path(__file__).resolve().parents[3]
"""The checkout, or the folder into which the packages are installed."""
FOLDERS = ("services", "shared")
"""Folders with pages."""
CHECKOUT_FOLDERS = (*FOLDERS, "docker", "k8s")
"""Folders with pages in a checkout. An installed package may have others' folders of these names beside it."""
INDEX = "README.md"
REFERENCE = "api-reference"
"""Path of the page that is made from the OpenAPI document."""
SECTIONS = {
    "Use": (
        INDEX,
        "services/gateway/README.md",
        REFERENCE,
        "services/scheduler/README.md",
        "shared/engine/MODELS.md",
    ),
    "Operate": (
        "docker/README.md",
        "k8s/README.md",
        "services/device/README.md",
        "services/SECURITY.md",
        "services/FAILURES.md",
        "services/METRICS.md",
    ),
    "How it works": (
        "services/LIFE_OF_A_REQUEST.md",
        "services/drafter/README.md",
        "services/drafter/drafts/smollm2-135m-instruct/README.md",
        "shared/engine/README.md",
        "services/ADDING.md",
    ),
    "Measure": (
        "services/tools/bench/README.md",
        "services/tools/simulator/README.md",
        "services/tools/twin/README.md",
        "services/tools/replayer/README.md",
        "services/tools/training/README.md",
    ),
}
"""The pages in the order in which they are listed."""
OTHERS = "Other pages"
PREFIX = "/docs/"
PROJECT = "wisp"
BRAND = "WISP"
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^()\s]+)\)")
_EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


class Documents:
    """The pages by path. Each is rendered when it is first asked for."""

    def __init__(
        self, sources: Mapping[str, str] | None = None, described: Callable[[], Mapping[str, Any]] | None = None
    ) -> None:
        """sources: the pages' Markdown by path; by default the repository's. described: returns the OpenAPI document,
        for a page of its own.
        """
        self._sources = sources if sources is not None else dict(_sources())
        self._titles = {path: _title(text) or path for path, text in self._sources.items()}
        self._described = described
        if described is not None:
            self._titles[REFERENCE] = TITLE
        self._made: dict[str, bytes] = {}
        self._pictures = {
            _beside(name, page) for page, text in self._sources.items() for name in _PICTURE.findall(text)
        }
        self._markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
        # A wide table scrolls by itself.
        self._markdown.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
        self._markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")

    @property
    def paths(self) -> list[str]:
        """Paths of the pages, in the order of their sections."""
        return [path for paths in self.sections.values() for path in paths]

    @property
    def sections(self) -> dict[str, list[str]]:
        """Paths of the pages by section. Pages without one come last, in alphabetical order."""
        found = {name: [path for path in paths if path in self._titles] for name, paths in SECTIONS.items()}
        placed = {path for paths in found.values() for path in paths}
        found[OTHERS] = sorted(self._titles.keys() - placed)
        return {name: paths for name, paths in found.items() if paths}

    def picture(self, path: str) -> bytes | None:
        """Return a picture that a page shows; None if none shows it, or its file is missing."""
        if path not in self._pictures:
            return None
        try:
            return (ROOT / path).read_bytes()
        except OSError:
            return None

    def html(self, path: str) -> bytes | None:
        """Return a page as HTML; None if there is none of this path. The first time takes up to half a second."""
        if path not in self._titles:
            return None
        if path not in self._made:
            self._made[path] = self._page(path).encode()
        return self._made[path]

    def missing(self, problem: str) -> bytes:
        """Return the page that a browser gets for an unknown path: the problem, beside the list of all pages."""
        body = f"<h1>Page not found</h1>\n<p>{escape(problem)}. All pages are listed beside this text.</p>\n"
        return self._framed(f"Page not found · {BRAND}", body).encode()

    def _page(self, path: str) -> str:
        text = self._sources.get(path)
        if text is None:
            assert self._described is not None
            text = reference(self._described())
        tokens = self._markdown.parse(text)
        title = self._titles[path]
        name = title if title == BRAND else f"{title} · {BRAND}"
        _name_headings(tokens)
        _lead_links(tokens, path, self._titles)
        body = self._markdown.renderer.render(tokens, self._markdown.options, {})
        return self._framed(name, body, path)

    def _framed(self, title: str, body: str, current: str | None = None) -> str:
        listed = "\n".join(
            f"<section><h2>{escape(name)}</h2><ul>\n{self._links(paths, current)}\n</ul></section>"
            for name, paths in self.sections.items()
        )
        return _FRAME.format(title=escape(title), listed=listed, body=body)

    def _links(self, paths: Sequence[str], current: str | None) -> str:
        return "\n".join(
            f'<li><a href="{PREFIX}{path}"{" aria-current=page" if path == current else ""}>'
            f"{escape(self._titles[path])}</a></li>"
            for path in paths
        )


def _sources() -> Iterator[tuple[str, str]]:
    checkout = (ROOT / "pyproject.toml").is_file()
    if checkout and (readme := ROOT / INDEX).is_file():
        yield INDEX, readme.read_text("utf-8")
    else:
        try:
            description = metadata(PROJECT).json.get("description")
        except PackageNotFoundError:
            description = None
        if isinstance(description, str) and description:
            yield INDEX, description
    for folder in CHECKOUT_FOLDERS if checkout else FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.md")):
            yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")


def _title(text: str) -> str:
    """Return the first heading of a page, without marks."""
    found = re.search(r"^# +(.+)$", text, re.MULTILINE)
    return re.sub(r"[`*_]", "", found[1]).strip() if found else ""


def _name_headings(tokens: list[Token]) -> None:
    """Give each heading the id that links name it by, as GitHub does."""
    used: set[str] = set()
    for opening, inline in pairwise(tokens):
        if opening.type != "heading_open":
            continue
        text = "".join(part.content for part in inline.children or () if part.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        name, times = slug, 0
        while name in used:
            times += 1
            name = f"{slug}-{times}"
        used.add(name)
        opening.attrSet("id", name)


def _lead_links(tokens: list[Token], path: str, known: Mapping[str, Any]) -> None:
    """Point links between pages to their served paths, and remove links to files that are not served."""
    for inline in tokens:
        closing: list[str] = []
        for part in inline.children or ():
            if part.type == "link_open":
                target = _served(str(part.attrGet("href") or ""), path, known)
                part.tag = "a" if target else "span"
                part.attrs = {"href": target} if target else {}
                closing.append(part.tag)
            elif part.type == "link_close" and closing:
                part.tag = closing.pop()
            elif part.type == "image":
                part.attrSet("src", PREFIX + _beside(str(part.attrGet("src") or ""), path))


def _served(href: str, path: str, known: Mapping[str, Any]) -> str:
    """Return where a link leads; empty if its file is not served."""
    if _EXTERNAL.match(href) or href.startswith(("#", "/")):
        return href
    file, _, anchor = href.partition("#")
    target = _beside(file, path)
    if target not in known:
        target = f"{target}/{INDEX}"
    return (PREFIX + target + (f"#{anchor}" if anchor else "")) if target in known else ""


def _beside(file: str, path: str) -> str:
    """Return the path of a file that a page names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), file))


_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="/page/icon.svg">
<link rel="stylesheet" href="/page/page.css">
</head>
<body class="documents">
<a class="skip" href="#text">Skip to the text</a>
<header class="top"><a class="brand" href="/"><img src="/page/icon.svg" alt="" width="22" height="22">WISP</a>
<nav aria-label="Main"><a href="/">Playground</a><a href="/docs" aria-current="true">Docs</a>
<a href="/docs/api-reference">API reference</a></nav></header>
<div class="shelf">
<nav class="pages" aria-label="Pages">
{listed}
</nav>
<main id="text" class="text" tabindex="-1">
{body}</main>
</div>
</body>
</html>
"""
