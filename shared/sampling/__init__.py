"""Shared-noise sampling: the target's choice at each position, a function of seed, position and logits."""

__all__ = ["sampler"]
