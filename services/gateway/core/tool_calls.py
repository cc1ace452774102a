"""Tool calls in a model's text: an incremental parser for the formats in which models write them.

A call is a JSON object with a name and arguments; formats differ in the marks around it. The joined deltas do not
depend on how the text is split into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from services.gateway.core.call_text import SPACE, CallText

_BETWEEN = SPACE + "[],;"
"""Characters around the calls of a list."""
_NAME = re.compile(r"[\w.:-]+")


@dataclass(frozen=True)
class ContentDelta:
    """More text that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """More of a tool call. The first delta of a call has its name."""

    index: int
    arguments: str = ""
    name: str | None = None


ToolDelta = ContentDelta | CallDelta


@dataclass(frozen=True)
class ToolMarks:
    """The marks around the calls of a format. Without an opening mark, an answer that begins with a call is one."""

    opening: str = ""
    """Text before a call or a list of calls."""
    closing: str = ""
    """Text after a call; empty if there is none."""
    bare: bool = False
    """True if an answer may also begin with a call without the opening mark; it has to name an offered tool."""
    after_name: str = ""
    """Mark between name and arguments in the short form `name{…}`; empty without that form. Models may leave it out."""
    ignored: tuple[str, ...] = ()
    """Texts without meaning around calls, longer ones first."""


class _State(Enum):
    CONTENT = auto()
    CALLS = auto()
    """Before, between or after the calls of a list."""
    CALL = auto()
    """In a call's JSON object."""


class ToolCallParser:
    """Splits the text of one completion into content and tool calls.

    What looks like a call but is none stays content. So does a call without an opening mark of a tool that was not
    offered: it is an ordinary answer in JSON.
    """

    def __init__(
        self,
        marks: ToolMarks,
        offered: Collection[str],
        *,
        parallel: bool = True,
        fits: Callable[[str], bool] | None = None,
    ) -> None:
        """offered: names of the tools. parallel: False drops all calls but the first.

        fits: returns whether a text is a call of an offered tool, or the beginning of one; other texts are content. A
        call is then passed on when it is complete; without `fits`, as it comes.
        """
        self._fits = fits
        self._marks = marks
        self._offered = frozenset(offered)
        self._most = None if parallel else 1
        self._state = _State.CALLS if marks.bare or not marks.opening else _State.CONTENT
        self._marked = False
        """True after an opening mark."""
        self._pending = ""
        """Text that is not read yet, because its meaning depends on what follows."""
        self._read = ""
        """Text that was read since the last delta: content, if no call follows."""
        self._call = CallText()
        self._deltas: list[ToolDelta] = []
        self.calls = 0
        """Calls begun so far."""

    def feed(self, text: str) -> list[ToolDelta]:
        """Add text; return the deltas that it completes."""
        self._pending += text
        steps = {_State.CONTENT: self._content, _State.CALLS: self._between, _State.CALL: self._in_call}
        while self._pending and steps[self._state]():
            pass
        return self._taken()

    def finish(self) -> list[ToolDelta]:
        """End the text; return the last deltas."""
        if self._state is _State.CALL and not self._call.begun and self._is_held(self._call):
            self._begin_held(self._call)
        rest = self._read + (self._call.raw if self._state is _State.CALL else "") + self._pending
        if not self.calls or (self._state is not _State.CALL and not self._belongs_to_marks(rest.strip(_BETWEEN))):
            self._emit_content(rest)
        self._pending = self._read = ""
        return self._taken()

    def _taken(self) -> list[ToolDelta]:
        deltas, self._deltas = self._deltas, []
        return list(_joined(deltas))

    def _belongs_to_marks(self, text: str) -> bool:
        """Return whether a text after calls is empty or a beginning of a mark."""
        marks = self._marks
        return any(mark.startswith(text) for mark in (marks.opening, marks.closing, *marks.ignored))

    def _content(self) -> bool:
        """Pass on content up to an opening mark. White space before a mark belongs to the format."""
        opening = self._marks.opening
        found = self._pending.find(opening) if opening else -1
        if found >= 0:
            content = self._pending[:found]
            kept = content.rstrip(SPACE)
            self._emit_content(kept)
            self._read = content[len(kept) :]
            self._pending = self._pending[found:]
            self._state = _State.CALLS
            return True
        safe = len(self._pending) - _overlap(self._pending, opening)
        if opening:
            safe = len(self._pending[:safe].rstrip(SPACE))
        self._emit_content(self._pending[:safe])
        self._pending = self._pending[safe:]
        return False

    def _between(self) -> bool:
        """Read a mark or a separator, or begin a call. Returns False if more text is needed."""
        marks, pending = self._marks, self._pending
        if marks.opening and pending.startswith(marks.opening):
            self._marked = True
            return self._skip(len(marks.opening))
        if marks.closing and pending.startswith(marks.closing):
            self._marked = False
            self._state = _State.CONTENT
            self._skip(len(marks.closing))
            self._read = "" if self.calls else self._read
            return True
        if any(mark != pending and mark.startswith(pending) for mark in (marks.opening, marks.closing, *marks.ignored)):
            return False
        for ignored in marks.ignored:
            if pending.startswith(ignored):
                return self._skip(len(ignored))
        if pending[0] == "{":
            self._state, self._call = _State.CALL, CallText()
            return True
        if pending[0] in _BETWEEN:
            return self._skip(1)
        if self._marked and marks.after_name and (name := _NAME.match(pending)) is not None:
            return self._short_form(name.group())
        self._give_up()
        return True

    def _short_form(self, name: str) -> bool:
        """Begin a call `name{…}`. Returns False if more text is needed."""
        rest, mark = self._pending[len(name) :], self._marks.after_name
        if mark.startswith(rest):
            return False
        rest = rest.removeprefix(mark).lstrip(SPACE)
        if not rest:
            return False
        if rest[0] != "{":
            self._give_up()
            return True
        self._read += self._pending[: len(self._pending) - len(rest)]
        self._pending = rest
        self._state, self._call = _State.CALL, CallText(name)
        return True

    def _skip(self, count: int) -> bool:
        self._read += self._pending[:count]
        self._pending = self._pending[count:]
        return True

    def _in_call(self) -> bool:
        call = self._call
        for at, character in enumerate(self._pending, start=1):
            try:
                call.feed(character)
            except (ValueError, RecursionError):
                self._pending = self._pending[at - 1 if call.begun else at :]
                if call.begun and not call.has_arguments:
                    self._emit_call("{}")
                self._give_up("" if call.begun else call.raw)
                return True
            if self._fits is not None and not call.begun:
                if call.complete and self._is_held(call):
                    self._begin_held(call)
            elif call.name is not None and not call.begun:
                if not self._marked and call.name not in self._offered:
                    self._pending = self._pending[at:]
                    self._give_up(call.raw)
                    return True
                self._begin(call)
            if call.begun and not call.complete:
                self._emit_call(call.take_arguments())
            if call.complete:
                self._pending = self._pending[at:]
                self._end_call()
                return True
        self._pending = ""
        return False

    def _is_held(self, call: CallText) -> bool:
        """Return whether a text that is not passed on yet is a call."""
        return self._fits is not None and call.name in self._offered and self._fits(call.raw)

    def _begin_held(self, call: CallText) -> None:
        self._begin(call)
        if not call.complete:
            self._emit_call(call.take_arguments())

    def _begin(self, call: CallText) -> None:
        call.begun = True
        self._read = ""
        self.calls += 1
        if self._most is None or self.calls <= self._most:
            self._deltas.append(CallDelta(self.calls - 1, name=call.name))

    def _end_call(self) -> None:
        call = self._call
        if not call.begun:
            self._give_up(call.raw)
            return
        self._emit_call(call.take_arguments() if call.has_arguments else "{}")
        self._state = _State.CALLS

    def _emit_call(self, arguments: str) -> None:
        if arguments and (self._most is None or self.calls <= self._most):
            self._deltas.append(CallDelta(self.calls - 1, arguments))

    def _give_up(self, raw: str = "") -> None:
        """Pass on what was read, and `raw`, as content, and look for the next opening mark after it."""
        text = self._read + raw
        self._emit_content(text.lstrip(_BETWEEN) if self.calls else text)
        self._read = ""
        self._marked = False
        self._state = _State.CONTENT

    def _emit_content(self, text: str) -> None:
        if text:
            self._deltas.append(ContentDelta(text))


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest beginning of `mark` that `text` ends with; the whole mark does not count."""
    longest = min(len(text), len(mark) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(mark[:length])), 0)


def _joined(deltas: Iterable[ToolDelta]) -> Iterable[ToolDelta]:
    """Join deltas of the same kind that follow each other."""
    last: ToolDelta | None = None
    for delta in deltas:
        if isinstance(last, ContentDelta) and isinstance(delta, ContentDelta):
            last = ContentDelta(last.text + delta.text)
        elif (
            isinstance(last, CallDelta)
            and isinstance(delta, CallDelta)
            and delta.name is None
            and delta.index == last.index
        ):
            last = CallDelta(last.index, last.arguments + delta.arguments, last.name)
        else:
            if last is not None:
                yield last
            last = delta
    if last is not None:
        yield last
