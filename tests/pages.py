"""Markdown pages as data: the commands, links, settings and source files that they name."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SOURCES = ("py", "sh", "lua")
"""Endings of the source files that a page may name."""
_SOURCE = re.compile(rf"(?<![\w/.<>*-])((?:[\w.-]+/)*[\w.-]+\.(?:{'|'.join(SOURCES)}))(?![\w/])")
_SOURCE_WITH_NAMES = re.compile(rf"^((?:[\w.-]+/)*[\w.-]+\.(?:{'|'.join(SOURCES)})):\s*(.+)$")
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_FENCE = re.compile(r"^( *)(```+|~~~+)[^\n]*\n(.*?)^ *\2[ \t]*$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?\s*$", re.MULTILINE)
_HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
_ANCHOR = re.compile(r"<a\s+(?:id|name)=[\"']([^\"']+)[\"']")
_ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")
PLACEHOLDER = "…"
"""Stands for words of the reader's; in commands, also for `<name>` and `...`."""
_ANGLES = re.compile(r"<[\w -]+>|\.\.\.")
LONGEST_LINE = 120
_SEPARATORS = ";&|()"
_BEFORE_A_COMMAND = frozenset({"do", "then", "else", "if", "!", "sudo", "exec", "time", "export"})


@dataclass(frozen=True)
class Command:
    """A command line on a page, without assignments before it and redirections."""

    words: tuple[str, ...]
    whole: bool
    """True if it is complete, as in a block of code. Inline code may leave arguments out."""

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class NamedSource:
    """A source file that a page names, with the functions, classes or constants named in it."""

    path: str
    names: tuple[str, ...] = ()


class Page:
    """A page's text, split into prose, inline code and blocks of code."""

    def __init__(self, path: Path, text: str | None = None) -> None:
        self.path = path
        self.text = path.read_text("utf-8") if text is None else text

    @cached_property
    def blocks(self) -> list[str]:
        """Blocks of code, without their fences."""
        return [match[3] for match in _FENCE.finditer(self.text)]

    @cached_property
    def _without_blocks(self) -> str:
        return _FENCE.sub("", self.text)

    @cached_property
    def inline(self) -> list[str]:
        """Inline code; a line break in it counts as a space."""
        return [" ".join(match[2].split()) for match in _INLINE.finditer(self._without_blocks)]

    @property
    def commands(self) -> Iterator[Command]:
        """All command lines, whatever they run."""
        for block in self.blocks:
            for line in block.replace("\\\n", " ").splitlines():
                yield from commands_of(line, whole=True)
        for code in self.inline:
            yield from commands_of(code, whole=False)

    @property
    def links(self) -> Iterator[str]:
        """Targets of links and images."""
        prose = _INLINE.sub(lambda match: "`" + "x" * len(match[2]) + "`", self._without_blocks)
        yield from (match[1] for pattern in (_LINK, _REFERENCE) for match in pattern.finditer(prose))

    @cached_property
    def anchors(self) -> set[str]:
        """The targets of `#…`: GitHub's names of headings, and explicit anchors."""
        found = set(_ANCHOR.findall(self._without_blocks))
        for match in _HEADING.finditer(self._without_blocks):
            title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            times = 0
            while (name := f"{slug}-{times}" if times else slug) in found:
                times += 1
            found.add(name)
        return found

    @property
    def long_lines(self) -> list[str]:
        """Lines of prose that are too long to read and to compare; rows of tables have no other form."""
        lines = self._without_blocks.splitlines()
        return [line for line in lines if len(line) > LONGEST_LINE and not line.startswith("|")]

    @property
    def variables(self) -> set[str]:
        """Environment variables of the product; one that ends in `_` is the beginning of several."""
        return set(re.findall(r"\bWISP_[A-Z0-9_]+", self.text))

    @property
    def sources(self) -> Iterator[NamedSource]:
        """Source files named in inline code (`path.py`, `path.py: function`), in prose with a folder, and in blocks."""
        for code in self.inline:
            if match := _SOURCE_WITH_NAMES.match(code):
                yield NamedSource(match[1], tuple(_NAME.findall(match[2])))
            elif not _ANGLES.search(code) and PLACEHOLDER not in code:
                yield from (NamedSource(path) for path in _SOURCE.findall(_without_urls(code)))
        prose = _INLINE.sub("", self._without_blocks)
        for text in (prose, *self.blocks):
            paths = _SOURCE.findall(_without_urls(text))
            yield from (NamedSource(path) for path in paths if "/" in path)


def pages() -> list[Page]:
    """All pages of the repository."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        # Hidden folders are not entered: the brokers' packages in .wisp hold /proc while they are unpacked.
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("build", "dist")]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return [Page(path) for path in sorted(found)]


def commands_of(line: str, *, whole: bool) -> Iterator[Command]:
    """The commands of a shell line. A line that a shell would not read has none."""
    line = _ANGLES.sub(PLACEHOLDER, line)
    line = re.sub(r"\s\d>(&\d)?", lambda match: " " if match[1] else " >", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=_SEPARATORS + "<>")
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError:
        return
    words: list[str] = []
    skip = False
    for token in [*tokens, ";"]:
        if token in _SEPARATORS or token in ("&&", "||", ";;"):
            if words:
                yield Command(tuple(words), whole)
            words, skip = [], False
        elif set(token) <= set("<>&"):
            skip = True
        elif skip:
            skip = False
        elif words or not (token in _BEFORE_A_COMMAND or _ASSIGNMENT.match(token)):
            words.append(token)


def _without_urls(text: str) -> str:
    return re.sub(r"\w+://\S+", "", text)
