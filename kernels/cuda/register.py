"""Importing this module fills KERNELS["cuda"]."""

from kernels.cuda import attention, elementwise, embed, kv_write, norm, pool, rope  # noqa: F401
