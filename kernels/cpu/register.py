"""Importing this module fills `kernels.kernel.KERNELS["cpu"]` with every CPU kernel."""

from kernels.cpu import attention, basic, linear, linear_rope_kv, mla, moe, rope, sample

__all__ = ["attention", "basic", "linear", "linear_rope_kv", "mla", "moe", "rope", "sample"]
