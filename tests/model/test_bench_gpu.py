"""`wisp bench gpu` finds bits that depend on the batch, and runs on the CPU in Triton's interpreter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gpu_model import FlawedDecoder

from services.tools.bench.gpu import __main__ as bench
from services.tools.bench.gpu import texts
from services.tools.bench.gpu.exactness import ExactnessCheck
from services.tools.bench.gpu.plan import DEFAULT_KINDS, TINY_PLAN
from services.tools.bench.gpu.random_models import RandomModel, configuration
from shared.twin.files import load_target


@pytest.mark.parametrize(("flaw", "differs"), [(0.0, False), (1e-3, True)])
def test_a_bit_that_depends_on_the_batch_is_found_in_every_way(flaw: float, differs: bool) -> None:
    decoder: Any = FlawedDecoder(RandomModel(configuration("tiny")).description, flaw)
    outcomes = list(ExactnessCheck(decoder, 3, 200).outcomes())
    assert [one.positions for one in outcomes] == [600] * 5
    assert all((one.differing > 0) == differs for one in outcomes)


@pytest.mark.slow
def test_a_tiny_run_writes_its_tables_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    small = replace(TINY_PLAN, sessions=[1], exact_length=3, prompt=2)
    kinds = [kind for kind in DEFAULT_KINDS if kind != "texts"]  # they need the default model
    bench.measure(small, kinds, 1200.0, tmp_path, {"gpu": "none (interpreter)"})
    record = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert record["facts"]["gpu"] == "none (interpreter)"
    assert [step["outcome"] for step in record["steps"]] == ["done"] * 5
    assert [row["differing"] for row in record["exactness"]] == [0] * 5
    assert [row["new tokens"] for row in record["speed"]] == [1, 2, 5, 9]
    assert all(row["step ms"] > 0 and row["transformers ms"] > 0 for row in record["rivals"])
    assert all(row["cuBLAS µs"] > 0 for row in record["products"])
    (calibrated,) = record["calibration"]
    assert load_target(calibrated["file"]).kv_tokens > 0
    assert record["notes"][0] == "All 30 positions have the bits of one prefill."


@pytest.mark.big_model
def test_texts_under_load_are_compared_with_those_alone(target_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "target_folder", lambda *_: target_folder)
    name, count, tokens, differing, states = texts.compared_texts(torch.device("cpu"), 2, 3, quietly=True)
    assert (name, count, differing, states) == (target_folder.name, 2, 0, 0)
    assert 2 <= tokens <= 6
