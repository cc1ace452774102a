"""The engine takes kernels on NVIDIA GPUs; its sessions have the compiled pass's text there. See `test_gpu_decoder`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from shared.engine import Engine, Step, engine
from shared.engine.forward import PassOptions
from shared.errors import EngineError
from shared.models.description import NotDescribed

Family = Callable[[str], Path]


def options_on(torch_device: str) -> PassOptions:
    return PassOptions("bfloat16", torch.device(torch_device), threads=1, blocks=8)


@pytest.mark.parametrize(("torch_device", "reason"), [("xpu", "not on xpu"), ("mps", "not on mps")])
def test_other_devices_have_no_kernels(torch_device: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(NotDescribed, match=reason):
        engine._kernel_pass(tmp_path, options_on(torch_device))


def test_nvidia_gpus_take_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = pytest.importorskip("shared.engine.gpu_pass", exc_type=ImportError)
    made: list[PassOptions] = []
    monkeypatch.setattr(module, "GpuPass", lambda _folder, options: made.append(options))
    engine._kernel_pass(tmp_path, options_on("cuda:1"))
    assert made == [options_on("cuda:1")]


def test_without_triton_module_code_is_taken_and_the_reason_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "shared.engine.gpu_pass", None)
    with pytest.raises(NotDescribed, match="need Triton"):
        engine._kernel_pass(tmp_path, options_on("cuda"))


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes kernels for GPUs on the CPU."""
    pytest.importorskip("triton")
    import gpu_model  # noqa: F401

    from shared.engine import gpu_pass

    # The length of the check at load, short for the interpreter.
    monkeypatch.setattr(gpu_pass, "CHECKED_TOKENS", 4)
    monkeypatch.setattr(engine, "_kernel_pass", gpu_pass.GpuPass)


@pytest.mark.usefixtures("on_kernels")
def test_sessions_have_the_text_and_bits_of_the_contract(family: Family) -> None:
    folder = family("qwen3")
    on_gpu = Engine(folder, dtype="float32", budget_tokens=192, keep_hidden=True)
    assert on_gpu.batch_invariant
    assert on_gpu.module_code_reason == ""
    assert on_gpu.arithmetic.startswith("wisp-triton-1, triton ")
    prompt = [7 * place % tiny.VOCAB for place in range(9)]
    on_gpu.attach("s", [])
    logits = on_gpu.forward([Step("s", prompt, 9)]).logits
    hidden = on_gpu.hidden("s", 0, 9)
    # Rolled back and computed again beside another session.
    on_gpu.truncate("s", 4)
    on_gpu.attach("other", [])
    output = on_gpu.forward([Step("other", prompt[:3]), Step("s", prompt[4:], 5)])
    assert torch.equal(output.logits[output.rows(1)], logits[4:])
    assert torch.equal(on_gpu.hidden("s", 0, 9), hidden)


@pytest.mark.usefixtures("on_kernels")
def test_blocks_move_between_engines(family: Family) -> None:
    folder = family("llama")
    first, second = (Engine(folder, dtype="bfloat16", budget_tokens=128) for _ in range(2))
    for view in first._views(0):
        view.copy_(torch.randn(view.shape))
    content = b"".join(view.contiguous().view(torch.uint8).numpy().tobytes() for view in first._views(0))
    assert len(content) == first.block_bytes
    assert second.layout == first.layout
    assert second.adopt(b"name", content)
    assert second.block(b"name") == content


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("form", ["int8", "gguf"])
def test_integer_weights_are_refused_with_the_formats_that_run(form: str, family: Family) -> None:
    with pytest.raises(EngineError, match=rf"no {form} weights.*bfloat16 or float32.*WISP_DTYPE=bfloat16"):
        Engine(family("llama"), dtype=form, budget_tokens=64)


@pytest.mark.usefixtures("on_kernels")
def test_memory_that_does_not_suffice_is_named(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.engine import gpu_pass

    def full(*_args: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_pass, "GpuDecoder", full)
    with pytest.raises(EngineError, match=r"does not fit into the memory of cpu.*WISP_CACHE_TOKENS"):
        Engine(family("llama"), dtype="bfloat16", budget_tokens=128)


@pytest.mark.usefixtures("on_kernels")
def test_where_kernels_cannot_run_module_code_is_taken(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.engine import gpu_pass

    def fail(*_args: object) -> bool:
        raise RuntimeError("Failed to find C compiler.\nDetails")

    monkeypatch.setattr(gpu_pass, "settle", fail)
    on_module_code = Engine(family("llama"), dtype="float32", budget_tokens=64)
    assert on_module_code.module_code_reason == (
        "the kernels for GPUs cannot run on cpu (RuntimeError: Failed to find C compiler.)"
    )
