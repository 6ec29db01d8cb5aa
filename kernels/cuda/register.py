"""Importing this module fills KERNELS["cuda"]."""

from kernels.cuda import (  # noqa: F401
    attention,
    elementwise,
    embed,
    kv_write,
    linear,
    linear_cutlass,
    linear_fp8,
    mla,
    moe,
    norm,
    pool,
    rope,
    sample,
    state,
)
