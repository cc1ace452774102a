"""`python -m shared.engine.follower FD`: computes one GPU's part of a model, as the first GPU's process tells it.

It ends when that process ends, whose end closes the connection; signals are for the first process alone.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread

import torch

from shared.engine import gpu_pass
from shared.engine.followers import ClearBlock, CopyBlock, Failed, Loaded, LoadPart, Pass, PrepareGraphs, Started, Task
from shared.engine.forward import usable
from shared.gpu_kernels.graphs import StepGraphs, prepared_graphs


def main() -> None:
    """Follow until the connection ends. Ends with status 1 after a failure, whose reason is sent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        follow(connection)
    except EOFError:
        return
    except Exception as error:
        with suppress(OSError):
            connection.send(Failed(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
        raise SystemExit(1) from error


@torch.inference_mode()
def follow(connection: Connection) -> None:
    """Load this rank's part of the model, and do what the first process does. Raises EOFError when that has ended."""
    task: Task = connection.recv()
    torch.set_num_threads(1)
    torch_device = usable(task.torch_device)
    connection.send(Started(gpu_pass.memory_of(torch_device)))
    load: LoadPart = connection.recv()
    decoder = gpu_pass.load_part(task.folder, task.form, torch_device, load.blocks, task.membership)
    connection.send(Loaded(gpu_pass.hardware_of(torch_device)))
    connection.recv()
    task.membership.join(torch_device)
    messages: SimpleQueue[object] = SimpleQueue()
    Thread(target=_receive, args=(connection, messages), daemon=True).start()
    graphs: StepGraphs | None = None
    with gpu_pass.current(torch_device):
        while True:
            match messages.get():
                case Pass() as step:
                    decoder.wide_tiles, decoder.joins_runs = step.wide_tiles, step.joins_runs
                    decoder.graphs = graphs if step.with_graphs else None
                    decoder.forward(step.batch, tokens=step.tokens, wanted=step.wanted)
                case PrepareGraphs():
                    graphs = prepared_graphs(decoder)
                case CopyBlock(source, target):
                    decoder.copy_block(source, target)
                case ClearBlock(block):
                    decoder.clear_block(block)


def _receive(connection: Connection, messages: SimpleQueue[object]) -> None:
    """Pass the messages on. Ends the process when the first one has ended: the main thread may wait for its part."""
    try:
        while True:
            messages.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    main()
