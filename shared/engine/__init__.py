"""The engine: one causal language model, its KV cache, and many sessions computed together."""

from shared.engine.engine import Engine, Step

__all__ = ["Engine", "Step", "attention", "blocks", "description", "engine", "families", "rope"]
