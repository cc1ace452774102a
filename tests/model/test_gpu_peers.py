"""Processes of several GPUs, here over gloo on the CPU: sums in the order of ranks, and the end of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from queue import Queue

import pytest
import torch
from import_graph import ROOT

from shared.engine.followers import Followers
from shared.errors import EngineError

pytestmark = pytest.mark.slow

RANK = """
import sys, torch
from pathlib import Path
from shared.engine.peers import GroupMembership, GroupPeers

rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
GroupMembership(rank, ranks, folder / "meeting").join(torch.device("cpu"))
peers = GroupPeers(ranks)
part = torch.randn(6, 5, generator=torch.Generator().manual_seed(rank)) * 1000 ** rank
whole, single = part.clone(), part[3:4].clone()
columns = peers.join(part)
peers.add(whole)
peers.add(single)
torch.save((part, columns, whole, single), folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""
FOLLOWER = """
import sys
from multiprocessing.connection import Connection
from shared.engine.followers import Failed, Loaded, Started

connection = Connection(int(sys.argv[-1]))
task = connection.recv()
connection.send(Started(None))
while True:
    match connection.recv():
        case "fail":
            connection.send(Failed("OutOfMemoryError: of the device"))
            sys.exit(1)
        case "load":
            connection.send(Loaded("capability 9.0"))
"""


def test_parts_are_added_in_the_order_of_ranks(tmp_path: Path) -> None:
    """Whatever else is in the batch: a row alone has the same bits."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RANK]
    processes = [subprocess.Popen([*command, str(rank), "3", str(tmp_path)], env=environment) for rank in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    parts = [part for part, *_ in results]
    expected = (parts[0] + parts[1]) + parts[2]
    assert not torch.equal(parts[0] + (parts[1] + parts[2]), expected)
    for _, columns, whole, single in results:
        assert torch.equal(columns, torch.cat(parts, 1))
        assert torch.equal(whole, expected)
        assert torch.equal(single, expected[3:4])


class GpuProcesses:
    """Followers without a model, and the reasons that were given for their loss."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.losses: Queue[str] = Queue()
        self.all = Followers(Path("model"), "bfloat16", devices, program=("-c", FOLLOWER), on_loss=self.losses.put)


@pytest.fixture
def gpu_processes(monkeypatch: pytest.MonkeyPatch) -> GpuProcesses:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return GpuProcesses(["cuda:0", "cuda:1", "cuda:2"])


def test_a_dead_process_of_a_gpu_is_named(gpu_processes: GpuProcesses) -> None:
    followers = gpu_processes.all
    assert followers.memories() == [None, None]
    followers.tell("load")
    followers.require_loaded("capability 9.0")
    followers.watch()
    followers._processes[1].kill()
    assert gpu_processes.losses.get(timeout=60) == "the process of GPU cuda:2 has ended (status -9)"
    with pytest.raises(EngineError, match="cuda:2 has ended"):
        followers.tell("load")
    followers.close()


def test_the_reason_of_a_failure_is_reported(gpu_processes: GpuProcesses) -> None:
    followers = gpu_processes.all
    followers.memories()
    followers.tell("fail")
    with pytest.raises(EngineError, match=r"cuda:1 has ended \(OutOfMemoryError: of the device\)"):
        followers.require_loaded("capability 9.0")
    followers.close()


def test_gpus_of_another_kind_are_refused(gpu_processes: GpuProcesses) -> None:
    followers = gpu_processes.all
    followers.memories()
    followers.tell("load")
    with pytest.raises(EngineError, match=r"cuda:1 is capability 9\.0, and the first GPU is capability 8\.0"):
        followers.require_loaded("capability 8.0")
    followers.close()
