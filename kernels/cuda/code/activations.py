"""The activations of kernels/ops/mlp.py on float32 values."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, KIND: tl.constexpr):
    """`KIND` is a name of kernels.ops.mlp.ACTIVATIONS."""
    if KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh u) / 2 is the sigmoid of 2u
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(KIND == "relu2")
        y = tl.where(x < 0.0, 0.0, x * x)
    return y


@triton.jit
def tanh(x):
    # libdevice is not there for the interpreter; this is exact at both ends and cannot overflow.
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def gated(gate, up, KIND: tl.constexpr):
    """`KIND` is a name of kernels.ops.mlp.GATED or kernels.ops.moe.CLAMPED."""
    if KIND == "swiglu_clamped":
        g = tl.minimum(gate, 7.0)
        u = tl.minimum(tl.maximum(up, -7.0), 7.0)
        y = (u + 1.0) * g * tl.sigmoid(1.702 * g)
    elif KIND == "swiglu":
        y = activate(gate, "silu") * up
    elif KIND == "geglu":
        y = activate(gate, "gelu") * up
    else:
        tl.static_assert(KIND == "geglu_tanh")
        y = activate(gate, "gelu_tanh") * up
    return y
