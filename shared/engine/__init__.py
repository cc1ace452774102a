"""The engine: one causal language model, its K/V cache, and many sessions computed together."""

from shared.engine.engine import Engine, Output, Step

__all__ = ["Engine", "Output", "Step"]
