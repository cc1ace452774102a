"""`wisp bench gpu` finds bits that depend on the batch, and runs on the CPU in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from gpu_model import FlawedDecoder

from services.tools.bench.gpu import __main__ as bench
from services.tools.bench.gpu.exactness import ExactnessCheck
from services.tools.bench.gpu.random_models import RandomModel, configuration


@pytest.mark.parametrize(("flaw", "differs"), [(0.0, False), (1e-3, True)])
def test_a_bit_that_depends_on_the_batch_is_found_in_every_way(flaw: float, differs: bool) -> None:
    decoder: Any = FlawedDecoder(RandomModel(configuration("tiny")).description, flaw)
    outcomes = list(ExactnessCheck(decoder, 3, 200).outcomes())
    assert [one.positions for one in outcomes] == [600] * 5
    assert all((one.differing > 0) == differs for one in outcomes)


def test_a_tiny_run_writes_its_tables_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(bench, "conclude", lambda _console, name, record: kept.append({"name": name, **record}))
    monkeypatch.setattr(bench, "TINY_PLAN", bench.GpuPlan(["tiny"], ["bfloat16"], 1, 2, 4, [2], 4, 1, 1, 4))
    bench.main(tiny=True)
    (record,) = json.loads(json.dumps(kept))
    assert record["name"] == "gpu-tiny"
    assert record["facts"]["gpu"] == "none (interpreter)"
    assert [row["differing"] for row in record["exactness"]] == [0] * 5
    assert [row["new tokens"] for row in record["speed"]] == [1, 5, 9]
    assert all(row["step ms"] > 0 and row["transformers ms"] > 0 for row in record["speed"])
    assert record["notes"][0] == "All 40 positions have the bits of one prefill."
