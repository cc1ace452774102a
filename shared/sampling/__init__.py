"""Shared-noise sampling: each choice of a token is a function of seed, position and logits."""

__all__ = ["likely", "logprobs", "noise", "rules", "sampler"]
