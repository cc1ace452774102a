"""Triton kernels for GPUs: a described model's pass, whose bits in a row do not depend on the rest of the batch."""

__all__ = ["check", "contracts", "decoder", "graphs", "launches", "memory", "parts", "plan", "products", "source"]
