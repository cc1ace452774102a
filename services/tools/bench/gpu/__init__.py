"""`wisp bench gpu`: bits and speed of the kernels for GPUs, on a GPU or, tiny, in Triton's interpreter."""
