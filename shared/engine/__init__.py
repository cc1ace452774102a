"""The engine: one causal language model, its KV cache, and many sessions computed together.

The package loads torch with the engine only, so that others can use the accounting of blocks without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.engine.engine import Engine
    from shared.engine.steps import Step

__all__ = [
    "Engine",
    "Step",
    "attention",
    "blocks",
    "compiled_pass",
    "engine",
    "forward",
    "module_pass",
    "steps",
    "trial",
]


def __getattr__(name: str) -> Any:
    if name in ("Engine", "Step"):
        from shared.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
