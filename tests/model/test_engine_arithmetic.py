"""The name of the module code's arithmetic: equal where the bits are equal, different where they may differ."""

from __future__ import annotations

import pytest
import torch
import transformers

from shared.engine.module_pass import module_arithmetic
from shared.messages import Heartbeat

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A CPU whose capabilities the test changes."""
    found: dict[str, object] = {"cpu_name": "AMD EPYC 7B13", "avx2": True, "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    return found


def test_the_libraries_and_the_kind_of_cpu_are_named(machine: dict[str, object]) -> None:
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert module_arithmetic(CPU, torch.float32) == f"{libraries}, cpu AVX2 AMD"


def test_instructions_for_bfloat16_count_where_they_are_used(machine: dict[str, object]) -> None:
    before = {dtype: module_arithmetic(CPU, dtype) for dtype in (torch.bfloat16, torch.float32)}
    machine |= {"avx512_bf16": True, "amx_bf16": True}
    assert module_arithmetic(CPU, torch.bfloat16) == before[torch.bfloat16].replace("AVX2", "AVX2 amx_bf16 avx512_bf16")
    assert module_arithmetic(CPU, torch.float32) == before[torch.float32]


def test_the_number_of_threads_does_not_count() -> None:
    before, threads = module_arithmetic(CPU, torch.bfloat16), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert module_arithmetic(CPU, torch.bfloat16) == before
    finally:
        torch.set_num_threads(threads)


def test_a_gpu_is_named_by_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 {device}")
    assert module_arithmetic(torch.device("cuda:1"), torch.bfloat16).endswith(", cuda NVIDIA H100 cuda:1")


def test_this_machines_own_name_travels_in_a_message() -> None:
    fields = {"verifier": "v", "fingerprint": "f", "max_len": 1, "free_tokens": 0, "total_tokens": 1}
    name = module_arithmetic(CPU, torch.bfloat16)
    assert Heartbeat.model_validate({**fields, "arithmetic": name}).arithmetic == name != ""
