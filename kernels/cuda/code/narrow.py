"""float32 values in the type they are stored in."""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_LARGEST = tl.constexpr(448.0)
E5M2_LARGEST = tl.constexpr(57344.0)
F16_LARGEST = tl.constexpr(65504.0)


@triton.jit
def clipped(x, LIMIT: tl.constexpr):
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))  # NaN stays


@triton.jit
def narrowed(x, ptr):
    """x in the type `ptr` points to, to nearest even. fp8 saturates at its largest finite value and
    keeps NaN; said here because versions of Triton and architectures differ about overflow."""
    type: tl.constexpr = ptr.dtype.element_ty
    if type == tl.float8e4nv:
        x = clipped(x, E4M3_LARGEST)
    elif type == tl.float8e5:
        x = clipped(x, E5M2_LARGEST)
    return x.to(type)
