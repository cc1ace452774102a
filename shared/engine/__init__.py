"""The engine: one causal language model, its KV cache, and many sessions computed together."""

from shared.engine.engine import Engine, Step

__all__ = [
    "Engine",
    "Step",
    "attention",
    "blocks",
    "compiled_pass",
    "engine",
    "forward",
    "module_pass",
    "trial",
    "weights",
]
