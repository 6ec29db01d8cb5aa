"""Importing this module fills `kernels.op.OPS` with every op."""

from kernels.ops import (
    attention,
    embed,
    linear,
    linear_rope_kv,
    mla,
    mlp,
    moe,
    norm,
    pool,
    rope,
    route,
    sample,
    state,
)

__all__ = [
    "attention",
    "embed",
    "linear",
    "linear_rope_kv",
    "mla",
    "mlp",
    "moe",
    "norm",
    "pool",
    "rope",
    "route",
    "sample",
    "state",
]
