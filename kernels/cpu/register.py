"""Importing this module fills `kernels.kernel.KERNELS["cpu"]` with every CPU kernel."""

from kernels.cpu import attention, basic, linear, rope, sample

__all__ = ["attention", "basic", "linear", "rope", "sample"]
