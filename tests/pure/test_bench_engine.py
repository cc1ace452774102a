"""The benchmarks of the engine and of formats: cases, ratios, tables, passages and the reasons for missing arms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from services.tools.bench.engine import llama_package
from services.tools.bench.engine.arms import EngineArm
from services.tools.bench.engine.core.cases import EngineCase, cases
from services.tools.bench.engine.core.results import EngineTimes, findings, speed_up_table, times_table
from services.tools.bench.engine.scores import scores
from services.tools.bench.formats import __main__ as formats

DECODE, VERIFY, PREFILL = EngineCase("decode", 1, 256), EngineCase("verify 5", 1, 256), EngineCase("prefill", 1, 0)


def times(visits: dict[str, list[list[float]]]) -> EngineTimes:
    """Times by arm, each with the visits of decode, verify and prefill."""
    made = EngineTimes(2, 256, [DECODE, VERIFY, PREFILL], list(visits))
    for arm, of_cases in visits.items():
        for case, of_case in zip(made.cases, of_cases, strict=True):
            for ms in of_case:
                made.add(arm, case, ms)
    return made


def test_one_session_runs_every_operation_and_several_decode_and_verify() -> None:
    found = [(case.operation, case.sessions, case.cached, case.new, case.rows) for case in cases([1, 8], 64)]
    assert found == [
        ("decode", 1, 64, 1, 1),
        ("verify 5", 1, 64, 5, 5),
        ("verify 9", 1, 64, 9, 9),
        ("prefill", 1, 0, 512, 1),
        ("decode", 8, 64, 1, 1),
        ("verify 5", 8, 64, 5, 5),
    ]


def test_a_case_survives_its_record() -> None:
    assert EngineCase(**VERIFY.record()) == VERIFY


def test_a_table_has_medians_a_prompt_rate_and_verifying_in_decode_steps() -> None:
    measured = times({"wisp int8": [[10, 30, 20], [15, 60, 20], [512, 256, 1024]]})
    columns, rows = times_table(measured)
    assert columns == ["arm", "decode, ms", "verify 5, ms", "prefill 512, tokens/s", "verify 5 / decode"]
    assert rows == [["wisp int8", 20, 20, 1000, 1.5]]


def test_a_ratio_of_arms_compares_visits_of_one_repetition() -> None:
    """The machine slows down by ten between the repetitions; the ratio stays that of neighbouring visits."""
    measured = times(
        {"wisp int8": [[1, 10, 100], [1, 1, 1], [1, 1, 1]], "llama.cpp Q8_0": [[2, 20, 200], [3, 3, 3], [0.5, 0.5, 1]]}
    )
    columns, rows = speed_up_table(measured)
    assert columns == ["arm", "times as fast as", "decode", "verify 5", "prefill 512"]
    assert rows == [["wisp int8", "llama.cpp Q8_0", 2, 3, 0.5]]


def test_arms_of_one_program_are_not_compared_with_each_other() -> None:
    one = [[1.0], [1.0], [1.0]]
    _, rows = speed_up_table(times({"wisp int8": one, "wisp bfloat16": one, "transformers float32": one}))
    assert [row[:2] for row in rows] == [
        ["wisp int8", "transformers float32"],
        ["wisp bfloat16", "transformers float32"],
    ]


def test_every_case_that_is_slower_is_reported_with_its_ratio() -> None:
    measured = times({"wisp int8": [[4], [1], [10]], "llama.cpp Q8_0": [[3], [2], [5]]})
    assert findings(measured) == [
        "2 threads, 256 cached: wisp int8 is slower than llama.cpp Q8_0 in decode (0.75), prefill 512 (0.50)"
    ]


def test_scores_are_the_loss_of_the_next_token_and_the_likeliest_one() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 1.0, 1.0]])) + 7
    losses, choices = scores(logits, [0, 1, 2])
    assert losses == pytest.approx([math.log(4), -math.log(0.7)])
    assert choices == [0, 2]


def test_the_passages_have_titles_and_no_marks_inside() -> None:
    found = formats.passages(formats.PASSAGES.read_text("utf-8"))
    assert list(found) == ["story", "explanation", "dialogue", "report", "instructions", "code", "letter", "arithmetic"]
    assert all(len(passage) > 600 and not passage.startswith("#") for passage in found.values())


def test_formats_are_compared_with_float32() -> None:
    measured = EngineTimes(1, 256, [formats.DECODE, formats.VERIFY], ["wisp float32", "wisp int8"])
    for arm in measured.arms:
        measured.add(arm, formats.DECODE, 10.0)
        measured.add(arm, formats.VERIFY, 13.0)
    predicted = {
        "wisp float32": formats.Predictions([math.log(2), math.log(8)], [1, 2]),
        "wisp int8": formats.Predictions([math.log(5), math.log(5)], [1, 3]),
    }
    rows = formats.rows_of(predicted, {"wisp int8": 150.0}, measured)
    assert rows == [
        ["wisp float32", pytest.approx(4), 100, None, 10, 13, 1.3],
        ["wisp int8", pytest.approx(5), 50, 150, 10, 13, 1.3],
    ]


def test_without_llama_cpp_the_notes_name_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_package, "state_folder", lambda: tmp_path)
    notes: list[str] = []
    assert llama_package.arms("smollm2-135m-instruct", notes) == []
    assert llama_package.arms("folder/of/a/model", notes) == []
    assert "wisp bench engine --install-llama" in notes[0]
    assert "GGUF" in notes[1]


def test_only_the_required_version_of_llama_cpp_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_package, "state_folder", lambda: tmp_path)
    (tmp_path / "llama" / "llama_cpp_python-0.3.1.dist-info").mkdir(parents=True)
    assert not llama_package.installed()
    wanted = llama_package.REQUIREMENTS[0].replace("==", "-").replace("llama-cpp-python", "llama_cpp_python")
    (tmp_path / "llama" / f"{wanted}.dist-info").mkdir()
    assert llama_package.installed()


def test_an_arm_is_named_for_its_program_and_format() -> None:
    assert EngineArm("llama.cpp", "Q4_1", Path("model.gguf")).name == "llama.cpp Q4_1"
