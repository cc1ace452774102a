"""The arms of the engine benchmark, each in its process, and the GGUF file in Q8_0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny

from services.tools.bench.engine.arms import ArmFailed, ArmProcess, ArmSizes, EngineArm
from services.tools.bench.engine.core.cases import cases
from services.tools.bench.engine.llama_package import in_q8_0, weights_format
from services.tools.bench.engine.measure import measure, started
from services.tools.local.progress import Progress

pytestmark = pytest.mark.slow

SIZES = ArmSizes(threads=1, cached=70, sessions=3)
"""More cached tokens than a block, so that a session has copied and computed ones."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="module")
def processes(folder: Path) -> Iterator[list[ArmProcess]]:
    arms = [EngineArm("wisp", "float32", folder), EngineArm("transformers", "float32", folder)]
    notes: list[str] = []
    with started(arms, SIZES, Progress(), notes, measure_memory=True) as loaded:
        assert notes == []
        yield loaded


def test_every_arm_times_every_case_in_every_repetition(processes: list[ArmProcess]) -> None:
    wanted = cases([3], SIZES.cached)
    times = measure(processes, SIZES, wanted, 2, Progress())
    assert times.arms == ["wisp float32", "transformers float32"]
    assert {key: len(visits) for key, visits in times.visits.items()} == {
        (arm, case): 2 for arm in times.arms for case in wanted
    }
    assert all(ms > 0 for visits in times.visits.values() for ms in visits)


def test_arms_with_the_same_weights_score_a_text_alike(processes: list[ArmProcess]) -> None:
    tokens = list(range(5, 205, 2))
    (losses, choices), (other_losses, other_choices) = (process.score(tokens) for process in processes)
    assert len(losses) == len(choices) == len(tokens) - 1
    assert losses == pytest.approx(other_losses, abs=1e-3)
    assert choices == other_choices


def test_the_engine_reports_the_memory_of_its_weights(processes: list[ArmProcess]) -> None:
    assert abs(processes[0].facts["weights_mb"]) < 50  # of a model with 0.3 MB of weights: libraries do not count


def test_an_arm_that_cannot_be_loaded_is_left_out_with_the_reason(folder: Path) -> None:
    notes: list[str] = []
    arms = [EngineArm("wisp", "bfloat17", folder), EngineArm("transformers", "float32", folder)]
    with started(arms, SIZES, Progress(), notes) as loaded:
        assert [process.arm.name for process in loaded] == ["transformers float32"]
    assert len(notes) == 1
    assert "wisp bfloat17" in notes[0]
    assert "dtype must be one of" in notes[0]


def test_an_arm_whose_process_ends_is_named_in_the_error(folder: Path, tmp_path: Path) -> None:
    with ArmProcess(EngineArm("transformers", "float32", folder), SIZES, tmp_path / "log") as process:
        too_large = 10**6
        with pytest.raises(ArmFailed, match="transformers float32 ended with status 1"):
            process.score([too_large])


def test_a_file_in_q8_0_has_the_same_model(tmp_path: Path) -> None:
    source = tmp_path / "some-model.Q4_1.gguf"
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(64, 96)).astype(np.float32)
    norm = generator.normal(size=96).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer: Any = gguf.GGUFWriter(source, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_block_count(7)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("blk.0.attn_q.weight", gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    made = in_q8_0(source, tmp_path / "made")

    assert made.name == "some-model.Q8_0.gguf"
    assert (weights_format(source), weights_format(made)) == ("Q4_1", "Q8_0")
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(made)
    fields = {name: field.contents() for name, field in before.fields.items()}
    assert {name: field.contents() for name, field in after.fields.items()} == fields | {
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0)
    }
    old, new = (
        {one.name: (gguf.dequantize(one.data, one.tensor_type), list(one.shape)) for one in reader.tensors}
        for reader in (before, after)
    )
    assert {name: shape for name, (_, shape) in new.items()} == {name: shape for name, (_, shape) in old.items()}
    np.testing.assert_array_equal(new["output_norm.weight"][0], norm)
    np.testing.assert_allclose(new["blk.0.attn_q.weight"][0], old["blk.0.attn_q.weight"][0], atol=0.03)
    assert in_q8_0(source, tmp_path / "made").stat().st_mtime_ns == made.stat().st_mtime_ns
