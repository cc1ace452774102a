"""Prompts for the target model, whose answers a draft model learns from.

Templates and the fillers of their slots are TOML files in `templates/`. Held-out templates are kept out of training;
they fill their slots from the last part of each list, from which training templates never draw. Final templates are
held out from evaluation as well: nothing that shapes a draft may draw them, so that they measure it once, at the end.

A slot is a list's name in braces: `{city}`. `{city2}` is another city of the same prompt, `{City}` has a capital first
letter, and "a {job}" becomes "an actor". Fillers may have slots. All other braces are text.
"""

from __future__ import annotations

import ast
import calendar
import gzip
import os
import random
import re
import sysconfig
import tomllib
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata, resources
from math import ceil
from pathlib import Path
from typing import Any, Final, Literal

HELD_OUT_SHARE = 0.15
SPLIT_FROM = 7
SUFFIX_SHARE = 0.3
SYSTEM_SHARE = 0.2
LOWER_CASE_SHARE = 0.08
ROLES = ("system", "user", "assistant")
RAW_KIND = "completion"
TYPED_IN_HASTE = ("chat", "explain", "list", "story")
FINAL: Final = "final"

HeldOut = bool | Literal["final"]
"""False: for training. True: for evaluation. FINAL: for the final figures of a draft that is decided."""

_SLOT = re.compile(r"(?:\b([Aa]) )?\{([A-Za-z]+(?:_[a-z]+)*)(\d*)\}")
_CONSONANT_SOUND = ("uni", "use", "eu", "one", "ukulele")
_DEEPEST = 4
_TRIES = 20
_MONTHS = tuple(calendar.month_name)[1:]
_DAYS = tuple(calendar.day_name)

_GENERATED: dict[str, Callable[[random.Random], str]] = {
    "small": lambda rng: str(rng.randint(2, 12)),
    "number": lambda rng: str(rng.randint(11, 99)),
    "big": lambda rng: str(rng.randint(101, 9999)),
    "decimal": lambda rng: f"{rng.uniform(0.5, 99):.1f}",
    "percent": lambda rng: f"{rng.randint(2, 19) * 5}%",
    "price": lambda rng: f"${rng.choice((rng.randint(2, 40), rng.randint(5, 99) * 5, rng.randint(2, 60) * 100)):,}",
    "year": lambda rng: str(rng.randint(1650, 2024)),
    "day": lambda rng: rng.choice(_DAYS),
    "month": lambda rng: rng.choice(_MONTHS),
    "date": lambda rng: f"{rng.randint(1, 28)} {rng.choice(_MONTHS)}",
    "time": lambda rng: f"{rng.randint(7, 20)}:{rng.choice(('00', '15', '30', '45'))}",
    "numbers": lambda rng: ", ".join(str(rng.randint(1, 99)) for _ in range(rng.randint(4, 8))),
    "letter": lambda rng: rng.choice("abcdefghiklmnoprstw"),
}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class CorpusPrompt:
    """A prompt for the target model: either a conversation that ends with the user, or raw text to continue."""

    template: str
    kind: str
    turns: tuple[Turn, ...] | None
    text: str | None
    held_out: HeldOut


@dataclass(frozen=True)
class Template:
    """A prompt with slots. It has either `turns`, or `text` that is used without a chat template."""

    id: str
    kind: str
    turns: tuple[Turn, ...] | None
    text: str | None
    held_out: HeldOut


class Corpus:
    """Templates, and the lists that fill their slots.

    Raises ValueError if a template has no id, a used id, an unknown slot, an unknown value of `held_out`, or a last
    turn that is not the user's.
    """

    def __init__(self, files: Sequence[Mapping[str, Any]], lists: Mapping[str, Sequence[str]]) -> None:
        self._lists = lists
        self.templates: dict[str, Template] = {}
        for file in files:
            for entry in file.get("template", []):
                template = _template(entry, file.get("kind"), file.get("held_out", False))
                if template.id in self.templates:
                    raise ValueError(f"Template {template.id}: the id is used twice. Give each template its own.")
                for content in _contents(template):
                    self._check(f"Template {template.id}", content)
                self.templates[template.id] = template
        for name, fillers in lists.items():
            if not fillers:
                raise ValueError(f"List {name} is empty. Give it at least one filler.")
            for filler in fillers:
                self._check(f"List {name}", filler)

    def fillers(self, name: str, held_out: HeldOut) -> Sequence[str]:
        """Return a list's fillers for held-out prompts or for training. Both share a short list."""
        fillers = self._lists[name]
        if len(fillers) < SPLIT_FROM:
            return fillers
        kept = len(fillers) - ceil(len(fillers) * HELD_OUT_SHARE)
        return fillers[kept:] if held_out else fillers[:kept]

    def render(self, template: Template, rng: random.Random) -> CorpusPrompt:
        """Fill the template's slots; sometimes add a system message, or an instruction about the answer's style."""
        filling = _Filling(self, template.held_out, rng)
        if template.turns is None:
            return CorpusPrompt(template.id, template.kind, None, filling.fill(template.text or ""), template.held_out)
        turns = [Turn(turn.role, filling.fill(turn.content)) for turn in template.turns]
        if template.kind in TYPED_IN_HASTE and len(turns) == 1 and rng.random() < LOWER_CASE_SHARE:
            turns = [Turn("user", turns[0].content.lower().rstrip(".?!"))]
            return CorpusPrompt(template.id, template.kind, tuple(turns), None, template.held_out)
        suffixes = f"suffix_{template.kind}"
        if len(turns) == 1 and suffixes in self._lists and rng.random() < SUFFIX_SHARE:
            gap = "\n\n" if "\n" in turns[0].content else " "
            turns[0] = Turn("user", turns[0].content + gap + filling.fill(f"{{{suffixes}}}"))
        if turns[0].role != "system" and "system" in self._lists and rng.random() < SYSTEM_SHARE:
            turns.insert(0, Turn("system", filling.fill("{system}")))
        return CorpusPrompt(template.id, template.kind, tuple(turns), None, template.held_out)

    def sample(
        self, seed: int, count: int, held_out: HeldOut, kinds: Sequence[str] | None = None
    ) -> list[CorpusPrompt]:
        """Draw distinct prompts from each template in turn. The same arguments give the same prompts.

        Raises ValueError if there are no such templates or they make fewer different prompts.
        """
        rng = random.Random(seed)
        chosen = [
            template
            for template in self.templates.values()
            if template.held_out == held_out and (kinds is None or template.kind in kinds)
        ]
        rng.shuffle(chosen)
        rota = deque(chosen)
        prompts: dict[object, CorpusPrompt] = {}
        while len(prompts) < count:
            if not rota:
                raise ValueError(
                    f"{len(chosen)} templates make {len(prompts)} different prompts, not {count}. Ask for fewer."
                )
            template = rota.popleft()
            for _ in range(_TRIES):
                prompt = self.render(template, rng)
                if (content := prompt.turns or prompt.text) not in prompts:
                    prompts[content] = prompt
                    rota.append(template)
                    break
        return list(prompts.values())

    def _check(self, where: str, content: str) -> None:
        for match in _SLOT.finditer(content):
            name = _list_name(match[2])
            if name not in self._lists and name not in _GENERATED:
                raise ValueError(
                    f"{where}: there is no list for the slot {match[2]}. Add it to slots.toml or rename it."
                )


@dataclass
class _Filling:
    """The fillers of one prompt. The same slot gets the same filler; `{name}` and `{name2}` get different ones."""

    corpus: Corpus
    held_out: HeldOut
    rng: random.Random
    drawn: dict[str, dict[str, str]] = field(default_factory=dict)

    def fill(self, content: str, depth: int = 0) -> str:
        """Fill every slot. Raises ValueError if lists refer to each other in a cycle."""
        if depth > _DEEPEST:
            raise ValueError(f"The slots of {content!r} refer to themselves. Remove the cycle from slots.toml.")
        return _SLOT.sub(lambda match: self._filled(match, depth), content)

    def _filled(self, match: re.Match[str], depth: int) -> str:
        article, slot, index = match.groups()
        filler = self.fill(self._draw(_list_name(slot), index), depth + 1)
        if slot[0].isupper():
            filler = filler[:1].upper() + filler[1:]
        if article is None:
            return filler
        sound = filler.lower()
        vowel = sound.startswith(tuple("aeiou")) and not sound.startswith(_CONSONANT_SOUND)
        return f"{article}n {filler}" if vowel else f"{article} {filler}"

    def _draw(self, name: str, index: str) -> str:
        drawn = self.drawn.setdefault(name, {})
        if index not in drawn:
            if name in _GENERATED:
                drawn[index] = _GENERATED[name](self.rng)
            else:
                fillers = self.corpus.fillers(name, self.held_out)
                taken = drawn.values()
                drawn[index] = self.rng.choice([filler for filler in fillers if filler not in taken] or fillers)
        return drawn[index]


@cache
def corpus() -> Corpus:
    """Return the packaged templates and lists."""
    folder = resources.files(__package__) / "templates"
    files = {
        path.name: tomllib.loads(path.read_text("utf-8")) for path in folder.iterdir() if path.name.endswith(".toml")
    }
    lists = files.pop("slots.toml")
    return Corpus([files[name] for name in sorted(files)], lists)


def sample(seed: int, count: int, held_out: HeldOut, kinds: Sequence[str] | None = None) -> list[CorpusPrompt]:
    """Draw distinct prompts of the packaged corpus; see `Corpus.sample`."""
    return corpus().sample(seed, count, held_out, kinds)


def free_text(seed: int, count: int, chars: tuple[int, int] = (600, 2000)) -> list[str]:
    """Draw passages of texts and programs from this machine's packages, with lengths in characters in a range.

    The same arguments and files give the same passages. With too little text there are fewer, or none.
    """
    rng = random.Random(seed)
    sources = [files for files in _sources() if files]
    passages: dict[str, None] = {}
    for _ in range(count * _TRIES):
        if not sources or len(passages) == count:
            break
        passage = _passage(_read(*rng.choice(rng.choice(sources))), rng, chars)
        if passage:
            passages[passage] = None
    return list(passages)


def _template(entry: Mapping[str, Any], kind: str | None, held_out: HeldOut) -> Template:
    name, kind = entry.get("id"), entry.get("kind", kind)
    if not name or not kind:
        raise ValueError(f"Template {name or entry}: id and kind are needed, the kind there or at the top of its file.")
    if ("text" in entry) == ("turns" in entry):
        raise ValueError(f"Template {name}: give it either text or turns.")
    held_out = entry.get("held_out", held_out)
    if held_out not in (False, True, FINAL):
        raise ValueError(f'Template {name}: held_out is {held_out!r}. Set it to true or "{FINAL}", or leave it out.')
    if "text" in entry and kind == RAW_KIND:
        return Template(name, kind, None, entry["text"], held_out)
    entries = entry.get("turns") or [{"role": "user", "content": entry["text"]}]
    turns = [Turn(turn["role"], turn["content"]) for turn in entries]
    if "system" in entry:
        turns.insert(0, Turn("system", entry["system"]))
    if unknown := {turn.role for turn in turns} - set(ROLES):
        raise ValueError(f"Template {name}: {', '.join(sorted(unknown))} is no role. Use {', '.join(ROLES)}.")
    if turns[-1].role != "user":
        raise ValueError(f"Template {name}: the last turn has to be the user's.")
    return Template(name, kind, tuple(turns), None, held_out)


def _contents(template: Template) -> list[str]:
    return [turn.content for turn in template.turns] if template.turns else [template.text or ""]


def _list_name(slot: str) -> str:
    return slot[0].lower() + slot[1:]


@cache
def _sources() -> list[list[tuple[Path, bool]]]:
    """Return files by kind of text, which are drawn equally often. True: the text is the file's docstrings."""
    shared = Path("/usr/share")
    documents = [
        path
        for path in _files(shared / "doc")
        if path.suffix in ("", ".txt", ".md", ".rst", ".html", ".gz") and "changelog" not in path.name.lower()
    ]
    stdlib = [
        path
        for path in _files(Path(sysconfig.get_paths()["stdlib"]), {"site-packages", "dist-packages", "test", "tests"})
        if path.suffix == ".py"
    ]
    about = sorted(
        Path(str(file.locate()))
        for distribution in metadata.distributions()
        for file in distribution.files or []
        if file.name == "METADATA" or file.name.startswith("README")
    )
    plain = [documents, _files(shared / "common-licenses"), stdlib, about]
    return [[(path, False) for path in files] for files in plain] + [[(path, True) for path in stdlib]]


def _files(folder: Path, without: Collection[str] = ()) -> list[Path]:
    """Return the files below a folder in order. without: names of folders to leave out."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in without]
        found += [path for name in names if (path := Path(parent, name)).is_file()]
    return sorted(found)


def _read(path: Path, docstrings: bool) -> str:
    """Return a file's text; empty if it is unreadable, no text, or has lines too long to be written by hand."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        if docstrings:
            nodes = ast.walk(ast.parse(text))
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            text = "\n\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented))
    except (OSError, EOFError, ValueError, SyntaxError):
        return ""
    text = re.sub(r"\n{3,}", "\n\n", text.replace("\r\n", "\n"))
    return "" if "\0" in text or any(len(line) > 500 for line in text.split("\n")) else text


def _passage(text: str, rng: random.Random, chars: tuple[int, int]) -> str | None:
    """Draw a part of the text, from the start of a paragraph to the end of a line; None if the text is too short."""
    shortest, longest = chars
    starts = [0, *(match.end() for match in re.finditer(r"\n\n(?=\S)", text))]
    starts = [start for start in starts if start + shortest <= len(text)]
    if not starts:
        return None
    start = rng.choice(starts)
    part = text[start : start + rng.randint(shortest, longest)]
    if (end := part.rfind("\n")) >= shortest:
        part = part[:end]
    part = part.strip("\n")
    return part if len(part.strip()) >= shortest else None
