"""Compiled kernels: attention, matrix products and row operations on the CPU, whose bits the source alone fixes."""

__all__ = ["cache", "decoder", "finite", "formats", "gguf_blocks", "layout", "native", "row_product", "team", "weights"]
