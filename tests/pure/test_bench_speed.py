"""The stream benchmark: speeds, ratios, tables and differences, and the machine facts of all benchmarks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tools.bench.stream.cases import question
from services.tools.bench.stream.core import speed
from services.tools.bench.stream.core.speed import Case, TimedRequest
from services.tools.bench.support import options, report
from services.tools.bench.support.report import cpu_kind, instruction_set, machine, table
from services.tools.training.prompts import CorpusPrompt, Turn
from shared.errors import SettingsError

PROMPT = CorpusPrompt("t", "chat", (Turn("user", "Hello"),), None, held_out=True)


def case(kind: str = "chat", number: int = 0, temperature: float = 0.0) -> Case:
    return Case(kind, number, temperature, number, PROMPT, (1, 2, 3))


def timed(of: Case, arm: str, total_s: float, **other: object) -> TimedRequest:
    fields = {
        "tokens": [5, 6, 7, 8],
        "finish": "length",
        "first_s": 0.5,
        "first_tokens": 1,
        "summary": {"rounds": 2.0, "verified": 8.0, "accepted": 2.0},
    } | other
    return TimedRequest(of, arm, 0.0, total_s=total_s, **fields)  # type: ignore[arg-type]


FAST, SLOW, ODD = case("list"), case("story"), case("list", temperature=1.0)
RUN = [
    timed(FAST, "none", 4.0),
    timed(FAST, "auto", 2.0),
    timed(FAST, "generate", 1.0, summary={}, agrees=4),
    timed(SLOW, "none", 4.0),
    timed(SLOW, "auto", 5.0),
    timed(SLOW, "generate", 1.0, summary={}, agrees=3),
    timed(ODD, "none", 4.0),
    timed(ODD, "auto", 4.0),
]


def test_speed_counts_the_whole_request_and_the_stop_token() -> None:
    one = timed(FAST, "none", 2.5, finish="stop")
    assert one.speed == 2.0
    assert one.later_speed == 2.0
    assert timed(FAST, "none", 0.5, first_tokens=4).later_speed is None


def test_plain_decoding_is_compared_with_the_engine_alone() -> None:
    alone = [timed(FAST, "engine", 3.9, summary={}), timed(SLOW, "engine", 3.0, first_s=0.25, summary={})]
    assert speed.plain_verdict(RUN) is None
    verdict = speed.plain_verdict([*RUN, *alone])
    # Whole requests: 3.9 / 4 and 3 / 4. After the first token: 3.4 / 3.5 and 2.75 / 3.5.
    assert verdict is not None
    assert verdict.startswith("without drafts: 0.86 times as fast as the engine")
    assert "0.88 times after the first token" in verdict
    assert verdict.endswith("(aim: 0.97, missed)")


def test_ratios_compare_the_same_case() -> None:
    assert speed.ratios(RUN, "auto", "none") == {FAST: 2.0, SLOW: 0.8, ODD: 1.0}
    assert speed.ratios(RUN, "auto", "generate") == {FAST: 0.5, SLOW: 0.2}
    assert speed.ratios(RUN, "auto", "no such arm") == {}


def test_the_ratio_of_a_kind_is_the_median_of_its_cases() -> None:
    assert speed.by_kind(speed.ratios(RUN, "auto", "none")) == {"list": 1.5, "story": 0.8}


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.floats(0.1, 10))
def test_a_slow_spell_of_the_machine_changes_no_ratio(totals: list[float], spell: float) -> None:
    def run(factor: float) -> list[TimedRequest]:
        return [
            timed(case(number=i), arm, total_s * slower * factor)
            for i, total_s in enumerate(totals)
            for arm, slower in (("none", 1.3), ("auto", 1.0))
        ]

    ratios = speed.ratios(run(spell), "auto", "none")
    assert list(ratios.values()) == pytest.approx([1.3] * len(totals))


def test_the_verdict_names_missed_aims() -> None:
    verdict = speed.verdict(RUN, "auto", ["generate"])
    assert "1.00 times as fast as without drafts at the median of 3 requests (aim: 1.3, missed)" in verdict
    assert "best kind list 1.50, worst kind story 0.80 (aim: at least 0.95, missed)" in verdict
    assert verdict.endswith("0.35 times generate")
    good = [replace(one, total_s=1.0) if one.arm == "auto" else one for one in RUN]
    assert "missed" not in speed.verdict(good, "auto", [])
    assert "in one process" in verdict
    assert "in one process" not in speed.verdict(good, "auto", [])


def test_another_token_or_finish_reason_is_a_difference() -> None:
    assert speed.differences(RUN[:2]) == []
    other = replace(RUN[1], tokens=[5, 6, 9, 8])
    (line,) = speed.differences([RUN[0], other])
    assert "list 0 at temperature 0, seed 0: auto" in line
    assert "differs from none with 0 ms after 2 tokens" in line
    assert len(speed.differences([RUN[0], replace(RUN[1], finish="stop")])) == 1
    assert len(speed.differences([RUN[0], RUN[0], replace(RUN[0], delay_ms=20.0, tokens=[5])])) == 1


def test_agreement_is_the_length_of_the_common_prefix() -> None:
    assert speed.agreement([1, 2, 3], [1, 2, 4]) == 2
    assert speed.agreement([1, 2], [1, 2, 4]) == 2
    assert speed.agreement([], [1]) == 0


def test_agreement_with_transformers_is_reported_and_fails_nothing() -> None:
    (line,) = speed.agreements(RUN)
    assert line == "generate: the suite's completion in 1 of 2 compared answers; the others differ after 3 to 3 tokens"
    assert speed.agreements(RUN[:2]) == []


def test_an_answer_with_the_stop_token_equals_a_completion_without_it() -> None:
    stopped = timed(FAST, "none", 4.0, tokens=[5, 6], finish="stop")
    engine = timed(FAST, "engine", 1.0, tokens=[5, 6, 2], agrees=2)
    assert speed.agreements([stopped, engine]) == ["engine: the suite's completion in 1 of 1 compared answers"]


def test_tables_have_a_value_for_each_column() -> None:
    for columns, rows in (speed.arms_table(RUN, [0.0, 1.0]), speed.kinds_table(RUN, "auto", [0.0, 1.0])):
        assert all(len(row) == len(columns) for row in rows)
        assert table("title", columns, rows).row_count == len(rows)
    columns, rows = speed.arms_table(RUN, [0.0, 1.0])
    auto = dict(zip(columns, rows[1], strict=True))
    assert auto["arm"] == "auto"
    assert auto["x none, T=0"] == pytest.approx(1.4)
    assert auto["tokens per round"] == 2.0
    assert auto["accepted"] == 0.25
    generate = dict(zip(columns, rows[2], strict=True))
    assert generate["tokens per round"] is None
    assert generate["x none, T=1"] is None


def test_every_request_is_written_as_json() -> None:
    for one in RUN:
        written = json.loads(json.dumps(one.record()))
        assert written["tokens_per_s"] == pytest.approx(one.speed, abs=1e-3)
        assert ("tokens_as_suite" in written) == (one.arm == "generate")


def test_a_question_is_a_chat_or_a_raw_completion() -> None:
    chat = question(case(temperature=0.7), 9)
    assert chat.messages == ({"role": "user", "content": "Hello"},)
    assert (chat.max_tokens, chat.options) == (9, {"temperature": 0.7, "seed": 0})
    raw = question(replace(case("completion"), prompt=CorpusPrompt("t", "completion", None, "Once", held_out=True)), 9)
    assert (raw.prompt, raw.messages) == ("Once", ())


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"avx2", "avx512f", "avx512_bf16"}, "AVX-512 with bfloat16"),
        ({"avx2", "avx512f", "amx_bf16"}, "AVX-512 with bfloat16"),
        ({"avx2", "avx512f"}, "AVX-512 without bfloat16"),
        ({"sse4_2", "avx2"}, "AVX2 only"),
        ({"asimd", "bf16"}, "NEON with bfloat16"),
        ({"asimd"}, "NEON without bfloat16"),
        (set(), "unknown"),
    ],
)
def test_the_kind_of_cpu_is_named_by_its_flags(flags: set[str], name: str) -> None:
    assert instruction_set(flags) == name


def test_facts_of_the_machine_are_read_from_its_cpu_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_info = tmp_path / "cpuinfo"
    cpu_info.write_text(
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: Some CPU\n"
        "flags\t\t: fpu avx2 avx512f avx512_bf16\n"
    )
    monkeypatch.setattr(report, "CPU_INFO", cpu_info)
    facts = machine()
    assert (facts["processor"], facts["instructions"]) == ("Some CPU (family 25, model 1)", "AVX-512 with bfloat16")
    assert cpu_kind() == "Some CPU (family 25, model 1), AVX-512 with bfloat16"


def test_lists_in_options_are_parsed_or_refused_with_the_option() -> None:
    assert options.numbers("--delays", "0, 20,20,1.5", 100) == [0.0, 20.0, 1.5]
    assert options.whole_numbers("--sessions", "4,2", 1, 8) == [4, 2]
    assert options.whole_numbers("--sessions", "", 1, 8) == []
    assert options.some_of("--kinds", "code,chat", ["chat", "code"]) == ["code", "chat"]
    for refused in (
        lambda: options.numbers("--delays", "-1", 100),
        lambda: options.numbers("--delays", "101", 100),
        lambda: options.numbers("--delays", "", 100),
        lambda: options.whole_numbers("--delays", "9", 1, 8),
        lambda: options.whole_numbers("--delays", "1.5", 1),
        lambda: options.some_of("--delays", "poem", ["chat"]),
    ):
        with pytest.raises(SettingsError, match="--delays takes"):
            refused()
