"""Compiles the kernels for the CPU that numba's environment variables name, and writes an object file to stdout.

Fails if the code lets the compiler choose the bits of a result.
"""

# numba's annotations do not cover compiled code.
# mypy: disable-error-code="no-untyped-call, attr-defined"

from __future__ import annotations

import sys

from llvmlite import binding

from shared.kernels.layout import JobWord
from shared.kernels.native import SYMBOL
from shared.kernels.source.passes import (
    attend_bfloat16,
    attend_float32,
    decode_bfloat16,
    decode_float32,
    multiply_rows,
)
from shared.kernels.source.relaxed import relaxed
from shared.kernels.source.vectors import get_word, kernel

_FUNCTION = int(JobWord.FUNCTION)


@kernel
def run_function(job: int) -> None:
    """Run the function that the job names (`FUNCTIONS`). There is only one entry, so that all share their code."""
    number = get_word(job, _FUNCTION)
    if number == 0:
        decode_bfloat16(job)
    elif number == 1:
        decode_float32(job)
    elif number == 2:
        attend_bfloat16(job)
    elif number == 3:
        attend_float32(job)
    else:
        multiply_rows(job)


def main() -> None:
    """Write the object file."""
    (compiled,) = run_function.overloads.values()
    code = compiled.library.get_llvm_str()
    if found := relaxed(code):
        sys.exit(f"{len(found)} instructions let the compiler choose the bits of a result, for example: {found[0]}")
    name = compiled.fndesc.llvm_func_name
    # numba's functions return a status and take two more pointers; nothing here raises, so both are ignored.
    entry = f"""
define void @{SYMBOL}(i64 %job) {{
  %result = alloca ptr
  %error = alloca ptr
  call i32 @{name}(ptr %result, ptr %error, i64 %job)
  ret void
}}
"""
    module = binding.parse_assembly(code + entry)
    for item in [*module.functions, *module.global_variables]:
        if not item.is_declaration and item.name != SYMBOL:
            item.linkage = "internal"
    machine = compiled.library._codegen._tm
    cleaning = binding.create_new_module_pass_manager()
    cleaning.add_global_dead_code_eliminate_pass()
    cleaning.run(module, binding.create_pass_builder(machine, binding.create_pipeline_tuning_options()))
    sys.stdout.buffer.write(machine.emit_object(module))


if __name__ == "__main__":
    main()
