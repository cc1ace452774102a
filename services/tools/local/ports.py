"""Free TCP ports on the loopback interface."""

from __future__ import annotations

import socket
from contextlib import ExitStack

LOOPBACK = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Return different free ports. Another process may take one before its use: be ready to retry."""
    with ExitStack() as stack:
        return [_bind(stack.enter_context(socket.socket())) for _ in range(count)]


def is_free(host: str, port: int) -> bool:
    """Return whether a server could listen at the address now."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError:
            return False
        return True


def _bind(trial: socket.socket) -> int:
    trial.bind((LOOPBACK, 0))
    port: int = trial.getsockname()[1]
    return port
