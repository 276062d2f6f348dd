"""One kernel, run in either of two modes: operation by operation, or fused into one pass by torch.compile.

Both give the same bits. For that a kernel uses only what is exact or rounded once by IEEE rules in either: comparisons,
minimum and maximum, multiplication, tensor-by-tensor division, rounding, casts of values that fit, sums in an order that is
written down (`pairwise_sum`) or of integers. Not: division by a constant (compilers multiply by its inverse instead), sums
over a dim (the order differs), casts to bf16 that lose bits (compilers keep the float32 instead; `round_bf16` rounds in
integers).
"""

import shutil
from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST = 2.0**-120
"""A scale below this counts as zero: its inverse would leave float32's range, and bf16 has too few bits there."""


def fused_or_reason() -> str | None:
    """None if fused kernels can be made for the CPU here, else why not: codecs asked for them then run operation by operation."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler was found"
    return None if shutil.which(compiler) else f"the C++ compiler {compiler} was not found"


def compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """`kernel` fused, for tensors [n, ..] and [r, n, ..] that differ from call to call in n only, which is at least 2, and in r.

    The first call compiles, and the first of each r: seconds, or less from the cache on disk. n is one symbol for all tensors, so
    that there is one loop over blocks; flat tensors would give a loop each, and as many passes over memory. What is written to
    must not lie between what else is handed over: torch.compile would think that they overlap.
    """
    fused = torch.compile(kernel, fullgraph=True)

    def run(*tensors: Tensor) -> None:
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2)
            if tensor.dim() == 3:
                torch._dynamo.mark_static(tensor, 0)
        fused(*tensors)

    return run


def round_bf16(values: Tensor, *, up: bool = False) -> Tensor:
    """Float32 with bf16's bits, rounded to nearest, ties away from zero; or never down, where values are not negative. inf and
    nan stay what they are."""
    bits = (values.view(torch.int32) + (0xFFFF if up else 0x8000)) & -0x10000
    return torch.where(values.isfinite(), bits.view(torch.float32), values)


def inverse(scales: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is too small to have one, so that such a block is coded as zeros."""
    return torch.where(scales < SMALLEST, 0.0, 1.0 / scales)


def pairwise_sum(rows: Tensor) -> Tensor:
    """[n, width] -> [n]: halves added onto each other while the width is even, then column by column: one order, everywhere."""
    width = rows.shape[1]
    while width % 2 == 0:
        width //= 2
        rows = rows[:, :width] + rows[:, width:]
    total = rows[:, 0]
    for column in range(1, width):
        total = total + rows[:, column]
    return total
