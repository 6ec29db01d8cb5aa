"""Importing this module fills KERNELS["cuda"]."""

from kernels.cuda import (  # noqa: F401
    attention,
    elementwise,
    embed,
    kv_write,
    linear,
    linear_cutlass,
    linear_fp8,
    linear_rope_kv,
    mla,
    moe,
    norm,
    pool,
    rope,
    sample,
    state,
)

linear_rope_kv.register_pairs()
