"""Importing this module fills KERNELS["cuda"]."""

from kernels.cuda import basic  # noqa: F401
