"""Runs single kernels on numpy arrays through the native plan loop: kernel tests and kernel
timings.

In: a registered kernel, the call it serves, arrays by parameter name (`x`, `w.data`). Out: the
arrays, updated in place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.kernel import CallShape, Kernel
from kernels.toolchain import build_cpu

CACHE = Path("~/.cache/headstart")
Array = NDArray[Any]

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "hs_abi": (ctypes.c_int, ()),
    "hs_open": (ctypes.c_void_p, (ctypes.c_int,)),
    "hs_close": (None, (ctypes.c_void_p,)),
    "hs_plan": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)),
    "hs_plan_free": (None, (ctypes.c_void_p,)),
    "hs_plan_profile": (None, (ctypes.c_void_p, ctypes.c_void_p)),
    "hs_submit": (
        ctypes.c_int64,
        (*(ctypes.c_void_p,) * 4, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    ),
    "hs_wait": (ctypes.c_double, (ctypes.c_void_p, ctypes.c_int64)),
    "hs_run": (ctypes.c_double, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)),
    "hs_read": (
        ctypes.c_int,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
    ),
    "hs_crc32c": (None, (*(ctypes.c_void_p,) * 5, ctypes.c_int)),
}


def load(level: str, cache: Path = CACHE) -> ctypes.CDLL:
    """The library of a level, built if needed."""
    return typed(build_cpu(level, cache))


def typed(path: Path) -> ctypes.CDLL:
    """A library with typed entry points."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def aligned(source: Array) -> Array:
    """A copy that starts on a 64-byte boundary, as every tensor of an arena does."""
    raw = np.empty(source.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + source.nbytes].view(source.dtype).reshape(source.shape)
    out[...] = source
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One bound plan node: the entry's address and its argument slots (`keep` owns what the
    slots point at)."""

    entry: int
    slots: Array
    keep: tuple[Array, ...]


class Team:
    """A thread team of one library; a context manager."""

    def __init__(self, level: str, threads: int, cache: Path = CACHE) -> None:
        self.library = load(level, cache)
        self.plans: dict[int, list[Node]] = {}
        self.handle = self.library.hs_open(threads)
        if not self.handle:
            raise RuntimeError(
                f"level {level} did not start {threads} threads: "
                "choose fewer threads or a lower level"
            )

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.library.hs_close(self.handle)
        for plan in list(self.plans):
            self.free(plan)

    def bind(self, kernel: Kernel, call: CallShape, arrays: Mapping[str, Array]) -> Node:
        """`arrays` are used where they are: contiguous, 64-byte aligned (`aligned`)."""
        scalars = kernel.scalars(call)
        workspace = aligned(np.zeros(max(kernel.workspace(call), 1), np.uint8))
        slots = np.zeros(len(kernel.params), np.uint64)
        keep = [workspace]
        for i, param in enumerate(kernel.params):
            kind, _, name = param.partition(":")
            if kind == "i64":
                slots[i : i + 1].view(np.int64)[0] = scalars[name]
            elif kind == "f64":
                slots[i : i + 1].view(np.float64)[0] = scalars[name]
            elif name == "workspace":
                slots[i] = workspace.ctypes.data
            elif name in arrays:
                keep.append(arrays[name])
                slots[i] = arrays[name].ctypes.data
        entry = ctypes.cast(getattr(self.library, kernel.entry), ctypes.c_void_p).value
        assert entry is not None
        return Node(entry=entry, slots=slots, keep=tuple(keep))

    def plan(self, nodes: list[Node]) -> int:
        """A plan handle; the team keeps the nodes alive until `free`."""
        entries = np.array([n.entry for n in nodes], np.uint64)
        slots = np.array([n.slots.ctypes.data for n in nodes], np.uint64)
        pointers = (entries.ctypes.data, slots.ctypes.data)
        plan = int(self.library.hs_plan(self.handle, len(nodes), *pointers))
        self.plans[plan] = nodes
        return plan

    def free(self, plan: int) -> None:
        self.library.hs_plan_free(plan)
        del self.plans[plan]

    def run(self, plan: int) -> float:
        """Runs a plan once without copies; its seconds."""
        ticket = self.library.hs_submit(self.handle, plan, None, None, 0, None, 0, 0)
        return float(self.library.hs_wait(self.handle, ticket))

    def call(self, function: int, argument: int) -> float:
        """Runs the shares of a native function of kernels/cpu/abi.h once; its seconds."""
        return float(self.library.hs_run(self.handle, function, argument))


def run_on(team: Team, kernel: Kernel, call: CallShape, arrays: dict[str, Array]) -> float:
    """Runs a kernel once on copies and copies them back; its seconds."""
    own = {name: aligned(array) for name, array in arrays.items()}
    node = team.bind(kernel, call, own)
    plan = team.plan([node])
    seconds = team.run(plan)
    team.free(plan)
    for name, array in arrays.items():
        array[...] = own[name]
    return seconds
