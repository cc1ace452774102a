"""Free TCP ports on the loopback interface."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

LOOPBACK = "127.0.0.1"
CHOICE = range(20_000, 30_000)
"""Ports below those that systems give to outgoing connections, one of which could take a port before its use."""


def free_ports(count: int) -> list[int]:
    """Return different free ports. Another process may take one before its use: be ready to retry."""
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(CHOICE, len(CHOICE)):
            if len(found) == count:
                return found
            with suppress(OSError):
                stack.enter_context(socket.socket()).bind((LOOPBACK, port))
                found.append(port)
        return found + [_bind(stack.enter_context(socket.socket())) for _ in range(count - len(found))]


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
