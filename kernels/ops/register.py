"""Importing this module fills `kernels.op.OPS` with every op."""

from kernels.ops import attention, embed, linear, mlp, norm, rope, sample, state

__all__ = ["attention", "embed", "linear", "mlp", "norm", "rope", "sample", "state"]
