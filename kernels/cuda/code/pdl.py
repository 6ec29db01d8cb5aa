"""Programmatic dependent launch: every kernel calls `wait` before it touches anything another
kernel writes or reads (weights excepted), in every program and on every path, and `release` once
its successor may start its own prologue.

A kernel that skips `wait` on any path breaks the order of the whole chain: its successor waits for
this kernel only.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait():
    tl.extra.cuda.gdc_wait()


@triton.jit
def release():
    tl.extra.cuda.gdc_launch_dependents()
