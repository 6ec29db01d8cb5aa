"""Importing this module fills KERNELS["cuda"]."""

from kernels.cuda import elementwise, embed, norm, pool  # noqa: F401
