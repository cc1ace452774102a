"""Timelines of recorded sessions as terminal text and as JSON fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from services.tools.cli.core.answer_rounds import AnswerRound, picture
from services.tools.cli.core.suite_view import short
from services.tools.cli.core.text_parts import DraftStyle, TextPart, counted, printable
from services.tools.replayer.core.timeline_records import BatchTime, Phase, RoundTime, RunReportTime, RunTime, Timeline
from services.tools.replayer.times import format_time
from shared.broker.topology import DEFAULT_POOL

Words = Callable[[int], str]
"""Returns the text of a token id."""

SHORT = {
    Phase.TO_DRAFTER: "to and in the drafter",
    Phase.DRAFT: "drafting",
    Phase.TO_SCHEDULER: "to the scheduler",
    Phase.POOL: "waiting for a batch",
    Phase.BEHIND: "behind another batch",
    Phase.MODEL: "model",
    Phase.VERIFIER: "to the verifier, commit",
}
BAR = 12
MATES = 6


def session_table(timelines: Sequence[Timeline]) -> RenderableType:
    """Return a table of sessions, with their times in milliseconds: to the first token, per later token, in total."""
    if not timelines:
        return Text("no session in the recording")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption="times in ms", caption_justify="left")
    for title in ("session", "started", "class", "prompt", "tokens", "rounds", "TTFT", "TPOT", "total", "end"):
        numbers = title not in ("session", "started", "class", "end")
        # On a narrow terminal the end takes more lines, and the session id stays whole.
        table.add_column(
            title, justify="right" if numbers else "left", no_wrap=title != "end", min_width=len(title), overflow="fold"
        )
    for one in timelines:
        table.add_row(
            Text(printable(short(one.session)), no_wrap=True),
            "-" if one.started_ms is None else format_time(one.started_ms)[11:19],
            printable(one.service_class),
            "-" if one.prompt is None else str(len(one.prompt)),
            str(one.tokens),
            str(len(one.rounds)),
            _ms(one.ttft_ms),
            _ms(one.tpot_ms, 1),
            _ms(one.total_ms),
            printable(one.ending) + (f", SLO {attained}" if (attained := _attained(one)) else ""),
        )
    return table


def timeline_view(one: Timeline, words: Words, style: DraftStyle, *, steps: bool = False) -> RenderableType:
    """A session's whole timeline as terminal text. steps: with the steps of its runs, report by report."""
    parts: list[RenderableType] = [*_head(one), Text()]
    parts += _spent(one)
    parts.append(Text())
    lines = picture([_drawn(round_, words) for round_ in one.rounds], style)
    if lines:
        parts.append(lines[0])
    runs = {run.after: run for run in one.runs}
    for line, round_ in zip(lines[1:], one.rounds, strict=True):
        parts.append(line)
        details = [Text(printable(text), "dim") for text in _details(round_, words)]
        parts += [Padding(detail, (0, 0, 0, 8), expand=False) for detail in details]
        if (run := runs.get(round_.round)) is not None:
            parts.append(Text(printable(_run(run, words))))
            if steps:
                details = [Text(printable(text), "dim") for text in _reports(run, words)]
                parts += [Padding(detail, (0, 0, 0, 8), expand=False) for detail in details]
    return Group(*parts)


def timeline_fields(one: Timeline, words: Words) -> dict[str, Any]:
    """Return a timeline's fields for JSON, with the text of its tokens."""
    fields = asdict(one)
    fields["slo"] = None if one.slo is None else one.slo.model_dump()
    fields["prompt_text"] = None if one.prompt is None else "".join(map(words, one.prompt))
    for round_, shown in zip(one.rounds, fields["rounds"], strict=True):
        outcomes = _outcomes(round_)
        shown["draft"] = [
            {"id": token, "text": words(token), "acceptance": chance, "fate": outcome}
            for token, chance, outcome in zip(
                round_.draft, _padded(round_.acceptance, len(round_.draft)), outcomes, strict=True
            )
        ]
        shown["tokens"] = [
            {"id": token, "text": words(token), "draft": i < round_.accepted} for i, token in enumerate(round_.tokens)
        ]
    for run, shown in zip(one.runs, fields["runs"], strict=True):
        shown["tokens"] = [{"id": token, "text": words(token)} for token in run.tokens]
    return fields


def _head(one: Timeline) -> list[Text]:
    promise = "no SLO" if one.slo is None else f"SLO {one.slo.ttft_ms:g} ms, then {one.slo.tpot_ms:g} ms a token"
    attained = _attained(one)
    lines = [Text.assemble(("session ", "bold"), (printable(one.session), "bold"))]
    lines.append(
        Text(printable(f"  {one.service_class or 'class unknown'}, {promise}" + (f": {attained}" if attained else "")))
    )
    prompt = "prompt not recorded" if one.prompt is None else f"{len(one.prompt)} prompt tokens"
    limit = "" if one.max_tokens is None else f" of at most {one.max_tokens}"
    speed = "" if one.ttft_ms is None else f"; first token after {one.ttft_ms:.0f} ms"
    speed += "" if one.tpot_ms is None else f", then {one.tpot_ms:.1f} ms a token"
    lines.append(Text(printable(f"  {prompt}, {one.tokens} tokens{limit} in {_rounds(one)}; {one.ending}{speed}")))
    when = "" if one.started_ms is None else f", from {format_time(one.started_ms)}"
    pool = f"pool {one.pool}" if one.pool not in ("", DEFAULT_POOL) else ""
    way = " → ".join(name for name in (one.gateway, pool, *one.drafters) if name)
    lines.append(Text(printable(f"  {way}{when}"), "dim"))
    notes = [
        f"the clocks of {clocks.sender} and {clocks.receiver} differ: a message arrived {clocks.ms:.1f} ms before it "
        "was sent, so times between them are shown as 0 or too long"
        for clocks in one.inversions
    ]
    lines += [Text(printable(f"  {note}"), "yellow") for note in (*notes, *one.notes)]
    return lines


def _rounds(one: Timeline) -> str:
    return counted(len(one.rounds), "round") + (f" and {counted(len(one.runs), 'run')}" if one.runs else "")


def _spent(one: Timeline) -> list[Text]:
    known_ms = sum(one.parts.values())
    if not known_ms:
        return []
    lines = [Text(f"  shares of {known_ms:,.0f} ms:")]
    for name, ms in sorted(one.parts.items(), key=lambda part: -part[1]):
        bar = "█" * round(BAR * ms / known_ms)
        lines.append(Text.assemble(f"  {ms:>9,.1f} ms {ms / known_ms:>5.0%}  {name:<46} ", (bar, "cyan")))
    return lines


def _drawn(round_: RoundTime, words: Words) -> AnswerRound:
    model_ms = round_.parts.get(Phase.MODEL, 0.0)
    waited_ms = round_.parts.get(Phase.POOL, 0.0)
    drafting_ms = round_.parts.get(Phase.DRAFT, 0.0)
    return AnswerRound(
        number=round_.round,
        total_ms=round_.total_ms if round_.total_ms is not None else sum(round_.parts.values()),
        draft_ms=drafting_ms,
        queue_ms=waited_ms,
        verify_ms=model_ms,
        verified=round_.verified,
        accepted=round_.accepted,
        tokens=tuple(TextPart(words(token), i < round_.accepted) for i, token in enumerate(round_.tokens)),
    )


def _details(round_: RoundTime, words: Words) -> Iterable[str]:
    steps = [f"{SHORT[Phase(name)]} {ms:.1f}" for name, ms in round_.parts.items()]
    at = "" if round_.start_ms is None else f"at {round_.start_ms:,.0f} ms: "
    yield at + (", ".join(steps) + " ms" if steps else round_.status)
    if round_.status != "committed":
        yield round_.status + (f": {round_.error}" if round_.error else "")
    if round_.draft or round_.own:
        yield "; ".join((*_draft(round_, words), *_own(round_, words)))
    price = "" if not round_.price_ms else f", price {round_.price_ms:.2f} ms a token"
    slack = "no SLO" if round_.slack_ms is None else f"slack {round_.slack_ms:.0f} ms when sent"
    yield f"{slack}{price}" + (f"; sent {round_.attempts} times" if round_.attempts > 1 else "")
    for batch, reason in round_.left_out:
        yield f"left out of batch {batch}: {reason}"
    for one in round_.batches:
        yield _batch(one)


def _run(run: RunTime, words: Words) -> str:
    """Describe a run in one line."""
    took = "" if run.total_ms is None else f" in {run.total_ms:,.0f} ms"
    copied = len(run.tokens) - run.steps
    copies = f", {counted(copied, 'copied token')}" if copied else ""
    end = f", {run.finish}" if run.finish else ""
    text = repr("".join(map(words, run.tokens)))
    reports = counted(len(run.reports), "report")
    return f"   run  on {run.verifier}{took}: {_steps(run)}{copies}, {reports}{end}: {text}"


def _steps(one: RunTime | RunReportTime) -> str:
    return f"{counted(one.steps, 'step')} of {one.verify_ms / max(1, one.steps):.1f} ms"


def _reports(run: RunTime, words: Words) -> Iterable[str]:
    """One line for each report of a run, with copies in angle quotes."""
    tokens = iter(run.tokens)
    for report in run.reports:
        at = "" if report.at_ms is None else f"at {report.at_ms:,.0f} ms: "
        texts = [repr(words(next(tokens))) for _ in range(report.tokens)]
        shown = (f"‹{text}›" if i in report.copied else text for i, text in enumerate(texts))
        yield f"{at}{_steps(report)}: {' '.join(shown)}"


def _draft(round_: RoundTime, words: Words) -> list[str]:
    """Describe the draft's tokens, grouped by outcome."""
    outcomes = _outcomes(round_)
    shown = []
    for outcome in dict.fromkeys(outcomes):
        texts = [repr(words(token)) for token, of in zip(round_.draft, outcomes, strict=True) if of == outcome]
        shown.append(f"{outcome}: {' '.join(texts)}")
    return shown


def _own(round_: RoundTime, words: Words) -> list[str]:
    """Describe the target's own tokens: the bonus token, or the tokens that another round had committed."""
    texts = " ".join(repr(words(token)) for token in round_.tokens[len(round_.tokens) - round_.own :])
    name = "bonus" if round_.status == "committed" else "committed by another round"
    return [f"{name}: {texts}"] if texts else []


def _outcomes(round_: RoundTime) -> list[str]:
    """Return the outcome of each draft token."""
    length = len(round_.draft)
    if round_.status != "committed":
        return ["unknown"] * length
    outcomes = ["accepted"] * min(round_.accepted, length)
    outcomes += ["rejected"] * (min(round_.verified, length) - len(outcomes))
    outcomes += ["not verified"] * (length - round_.trimmed - len(outcomes))
    return outcomes + ["trimmed"] * (length - len(outcomes))


def _batch(one: BatchTime) -> str:
    with_ = "alone" if not one.mates else "with " + ", ".join(map(short, one.mates[:MATES]))
    if (more := len(one.mates) - MATES) > 0:
        with_ += f" and {more} more"
    chunk = one.prefill_to is not None
    what = f"prompt to token {one.prefill_to}" if chunk else counted(one.draft, "draft token")
    took = "no result" if one.verify_ms is None else f"{one.verify_ms:.1f} ms"
    behind = "" if one.behind is None else f"; waited {one.behind_ms:.1f} ms for batch {one.behind}"
    slack = "" if one.slack_ms is None else f", slack {one.slack_ms:.0f} ms"
    new = "" if one.new_tokens is None else f", {counted(one.new_tokens, 'token')} computed"
    left = f"{counted(one.waiting, 'round')} left in the queue" if one.waiting else "none left in the queue"
    return (
        f"batch {one.batch} on {one.verifier} {with_}: {what}{new}, {took} (predicted {one.predicted_ms:.1f}); "
        f"{one.policy}: {one.reason or 'no reason given'}{slack}; {left}{behind}"
    )


def _padded(values: Sequence[float], length: int) -> list[float | None]:
    return [*values[:length], *[None] * (length - len(values))]


def _attained(one: Timeline) -> str:
    if one.slo is None or one.attained is None:
        return ""
    return "attained" if one.attained else "missed"


def _ms(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
