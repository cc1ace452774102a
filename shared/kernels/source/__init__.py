"""The kernels' source, compiled by numba: imported only to compile it (`shared.kernels.native`)."""

__all__: list[str] = []
