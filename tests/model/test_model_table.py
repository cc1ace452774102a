"""The page of models is what its script finds, for all types of the installed transformers."""

from __future__ import annotations

import re

import pytest
import transformers
from architectures import model_types
from model_table import COMPILED, EXACT, PAGE, REFUSED, UNTRIED, Row, page, tried

OUTCOMES = {"glm": EXACT, "gpt_oss": EXACT, "llama": COMPILED, "rwkv": REFUSED, "falcon_h1": REFUSED}


def test_the_page_has_every_model_type_once() -> None:
    text = PAGE.read_text()
    assert f"transformers {transformers.__version__} " in text, "`python tests/model_table.py` writes it anew"
    rows = text.partition("| outcome |")[2]
    assert (
        sorted(re.findall(r"`([\w.-]+)`", re.sub(r"^(\| `[^|]*\|).*", r"\1", rows, flags=re.MULTILINE)))
        == model_types()
    )


@pytest.mark.parametrize("model_type", OUTCOMES)
def test_a_type_has_the_outcome_on_the_page(model_type: str) -> None:
    row = tried(model_type)
    assert row.outcome == OUTCOMES[model_type], row.reason
    line = next(line for line in PAGE.read_text().splitlines() if f"`{model_type}`" in line)
    beginnings = {COMPILED: "| compiled pass:", EXACT: "| module code: on a CPU", REFUSED: f"| `{model_type}` |"}
    assert line.startswith(beginnings[row.outcome])
    assert row.reason in line


def test_a_page_has_a_place_for_every_outcome() -> None:
    rows = [Row("a", COMPILED), Row("b", EXACT), Row("c", REFUSED, "it cannot"), Row("d", UNTRIED)]
    text = page(rows)
    assert "| `c` | it cannot |" in text
    assert all(f"`{row.model_type}`" in text for row in rows)
