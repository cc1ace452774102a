"""Two processes compute one model over gloo, each by kernels in Triton's interpreter.

`make test-gpu` installs it and runs these tests; without it they are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from import_graph import ROOT

from shared.engine import Engine, engine
from shared.errors import EngineError

pytest.importorskip("triton")

from gpu_model import gpu_decoder

from shared.engine import followers, gpu_pass
from shared.engine.forward import PassOptions
from shared.gpu_kernels.memory import DeviceMemory, need_of
from shared.models.description import Linear

Family = Callable[[str], Path]
PROGRAM = """
import json, sys
import gpu_model
import torch
from pathlib import Path
from shared.engine import Engine, Step, engine, gpu_pass

folder, gpus, kills = Path(sys.argv[1]), int(sys.argv[2]), len(sys.argv) > 3
gpu_pass.CHECKED_TOKENS = 4
engine._kernel_pass = gpu_pass.GpuPass
computed = Engine(folder, dtype="float32", budget_tokens=256, gpus=gpus)
computed.attach("s", [])
text = [7 * place % 500 for place in range(9)]
logits = computed.forward([Step("s", text, 9)]).logits
if kills:
    computed._pass._followers._processes[0].kill()
    while True:
        computed.forward([Step("s", [1])])
# Rolled back into a block that another session shares after its own KV was copied, and beside another session.
computed.truncate("s", 4)
computed.attach("other", [])
output = computed.forward([Step("other", text[:3]), Step("s", text[4:], 5)])
same = torch.equal(output.logits[output.rows(1)], logits[4:])
computed._pass.copy_block(computed._pool.table("s")[0], 3)
computed._pass.clear_block(computed._pool.table("s")[0])
computed._pool.table("s")[0] = 3
computed.truncate("s", 8)
copied = torch.equal(computed.forward([Step("s", text[8:])]).logits, logits[8:])
completion = [int(logits[-1].argmax())]
for _ in range(3):
    completion.append(int(computed.forward([Step("s", completion[-1:])]).logits.argmax()))
print(json.dumps({
    "exact": computed.batch_invariant, "arithmetic": computed.arithmetic, "same": same, "copied": copied,
    "text": completion, "logits": logits[-1].tolist(),
}))
"""


def computed_by(folder: Path, gpus: int, *more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(gpus), *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["qwen3", "llama-biases"])
def test_two_processes_have_the_text_of_one(name: str, family: Family) -> None:
    one, two = (computed_by(family(name), gpus) for gpus in (1, 2))
    assert two.returncode == 0, two.stderr[-3000:]
    single, shared = json.loads(one.stdout), json.loads(two.stdout)
    assert shared["exact"]
    assert shared["same"]
    assert shared["copied"]
    assert shared["text"] == single["text"]
    assert shared["arithmetic"] == f"{single['arithmetic']}, 2 parts"
    torch.testing.assert_close(torch.tensor(shared["logits"]), torch.tensor(single["logits"]), atol=1e-4, rtol=1e-4)


def test_a_dead_process_ends_the_first_one_with_the_reason(family: Family) -> None:
    done = computed_by(family("qwen3"), 2, "kill")
    assert done.returncode == followers.STATUS
    assert "the process of GPU cpu has ended (status -9)" in done.stdout + done.stderr


def test_a_model_that_cannot_be_split_is_refused(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_kernel_pass", gpu_pass.GpuPass)
    for name, gpus, reason in (("llama", 3, "4 heads"), ("olmo2", 2, "span all heads")):
        with pytest.raises(EngineError, match=reason):
            Engine(family(name), dtype="float32", gpus=gpus)
    with pytest.raises(EngineError, match="no int8 weights"):
        Engine(family("llama"), dtype="int8", gpus=2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "olmo2", "phi3-partial", "llama-biases"])
def test_the_computed_memory_is_that_of_a_decoder(name: str, family: Family) -> None:
    """Weights and KV to the byte; buffers are an upper bound."""
    from shared.engine.weights import opened

    decoder = gpu_decoder(family(name), "bfloat16")
    with opened(family(name), "bfloat16") as weights:

        def outputs(linear: Linear) -> int:
            return linear.weight.rows or weights.shape(linear.weight.name)[0]

        need = need_of(decoder.model, outputs, "bfloat16")
    tensors: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, list):
            for each in value:
                add(each)
        elif hasattr(value, "__slots__") or hasattr(value, "__dict__"):
            names = getattr(type(value), "__slots__", ()) or vars(value)
            for each in names:
                if each != "description":
                    add(getattr(value, each))

    add(decoder._weights)
    assert need.weights == sum(tensors.values())
    assert need.block * decoder.keys.shape[1] == sum(
        held.numel() * held.element_size() for held in (decoder.keys, decoder.values)
    )


def test_kv_takes_the_share_of_memory_that_is_left(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family("llama")
    options = PassOptions("bfloat16", torch.device("cpu"), 1, None, keep_hidden=True, gpu_memory=0.5)
    few, more = (gpu_pass.fitting_blocks(folder, options, [DeviceMemory(free, 8 << 30)]) for free in (2 << 30, 3 << 30))
    # Keys and values of two layers and two heads of 12, and a row of 48 hidden states, each in two bytes.
    assert more - few == pytest.approx((1 << 30) / (64 * 2 * (2 * 2 * 2 * 12 + 48)), abs=1)
    monkeypatch.setattr(engine, "_kernel_pass", gpu_pass.GpuPass)
    monkeypatch.setattr(gpu_pass, "memory_of", lambda _device: DeviceMemory(1 << 30, 8 << 30))
    monkeypatch.setattr(gpu_pass, "load_part", None)
    with pytest.raises(EngineError, match=r"do not fit: weights of .*WISP_GPU_MEMORY=0\.5.*1\.0 of 8\.0 GiB free"):
        Engine(folder, budget_tokens=None, gpu_memory=0.5)


def test_more_gpus_than_a_node_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpu_pass.devices_of(torch.device("cuda"), 2) == ["cuda:0", "cuda:1"]
    with pytest.raises(EngineError, match=r"has 2 GPUs.*more GPUs than one node has cannot be served"):
        gpu_pass.devices_of(torch.device("cuda:1"), 2)
