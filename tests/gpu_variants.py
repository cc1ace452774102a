"""Kernels compiled for GPUs that are not here: launches are recorded and compiled, not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from shared.gpu_kernels.launches import OPTIONS, Grid

TYPES: Final = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
}
"""Triton's names of the elements that kernels read and write."""


@dataclass(frozen=True)
class KernelVariant:
    """One compilation of a kernel."""

    kernel: str
    """Its name in `source`."""
    signature: Mapping[str, str]
    """Types of the run-time arguments, by name."""
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Text that tells variants apart."""
        return repr((self.kernel, sorted(self.signature.items()), sorted(self.constants.items()), self.options))


class VariantRecorder:
    """A launcher that computes nothing and keeps what would have been compiled, as for tensors of the device `meta`."""

    def __init__(self) -> None:
        self._variants: dict[str, KernelVariant] = {}

    @property
    def variants(self) -> list[KernelVariant]:
        """Variants in the order of their first launch."""
        return list(self._variants.values())

    def __call__(self, kernel: Any, grid: Grid, *arguments: Any, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants} | OPTIONS
        names = kernel.arg_names[: len(arguments)]
        signature = {
            name: f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
            for name, value in zip(names, arguments, strict=True)
        }
        variant = KernelVariant(kernel.fn.__name__, signature, constants, options)
        self._variants.setdefault(variant.key, variant)


@dataclass(frozen=True)
class CompiledVariant:
    """A kernel in a GPU's own code."""

    ptx: str
    code_bytes: int
    shared_bytes: int
    """Shared memory of a program."""


def compile_variant(variant: KernelVariant, capability: int) -> CompiledVariant:
    """Compile a kernel for NVIDIA GPUs of this capability (90 for 9.0), which need not be here.

    Raises what Triton's compiler raises. Cannot be used in a process with TRITON_INTERPRET=1.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from shared.gpu_kernels import source

    kernel = getattr(source, variant.kernel)
    specialized = [
        name for name in variant.signature if variant.signature[name] == "i32" and not _unspecialized(kernel, name)
    ]
    if specialized:
        raise ValueError(f"{variant.kernel} would be compiled anew for some values of {', '.join(specialized)}")
    # Every pointer is that of an allocation, or of a part that begins at a multiple of 16 bytes.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if variant.signature.get(name, "").startswith("*")
    }
    ast = ASTSource(kernel, dict(variant.signature), constexprs=dict(variant.constants), attrs=aligned)
    compiled = triton.compile(ast, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    return CompiledVariant(compiled.asm["ptx"], len(compiled.asm["cubin"]), compiled.metadata.shared)


def _unspecialized(kernel: Any, name: str) -> bool:
    """Return whether one compilation serves every value of an argument."""
    return any(one.name == name and one.do_not_specialize for one in kernel.params)
