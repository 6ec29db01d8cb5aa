"""A CUDA kernel: one implementation of one op, with a space of configurations.

Comes in: a call. Goes out: configurations worth trying, the launches of one of them. The device
code stands in `kernels/cuda/code` and is imported only by the toolchain's workers, so registration
needs no triton. Registered in `KERNELS["cuda"]` by the files of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from kernels.kernel import KERNELS, CallShape
from kernels.launch import (
    COUNTERS,
    WORKSPACE,
    Constant,
    Descriptor,
    Launch,
    Number,
    Pointer,
    Slot,
    Source,
)

TYPES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
}
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8e4nv": 1, "fp8e5": 1, "i64": 8, "i32": 4}
SIZES |= {"i8": 1, "u8": 1, "i16": 2, "fp64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A point of a kernel's search space; kernels derive their own frozen type from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaKernel:
    """`accepts(call)`: None, or why this kernel cannot serve the call at all.
    `space(call)`: configurations worth timing; `valid(call, config)`: None, or why a configuration
    cannot be used (shared memory, divisibility); `default(call)`: the heuristic's choice, valid.
    `launches(call, config)`: what runs, in order; every launch waits for the one before it.
    `workspace(call, config)`: bytes of scratch shared by the launches of the call.
    `tuned_only`: never chosen by the heuristic, only by a measured record.
    """

    name: str
    op: str
    accepts: Callable[[CallShape], str | None]
    space: Callable[[CallShape], Iterable[Any]]
    default: Callable[[CallShape], Any]
    launches: Callable[[CallShape, Any], tuple[Launch, ...]]
    valid: Callable[[CallShape, Any], str | None] = field(default=lambda call, config: None)
    workspace: Callable[[CallShape, Any], int] = field(default=lambda call, config: 0)
    tuned_only: bool = False

    def candidates(self, call: CallShape) -> tuple[Any, ...]:
        """The default, then every other valid configuration of the space."""
        first = self.default(call)
        rest = (c for c in self.space(call) if self.valid(call, c) is None)
        return tuple(dict.fromkeys((first, *rest)))


def register(kernel: CudaKernel) -> CudaKernel:
    if any(k.name == kernel.name for k in KERNELS["cuda"]):
        raise ValueError(f"kernel {kernel.name!r} is registered twice for cuda")
    KERNELS["cuda"].append(kernel)
    return kernel


def pointer(call: CallShape, arg: str, offset: int = 0) -> Pointer | None:
    """An argument's address with the call's type; None (a constant) when it is absent."""
    if arg not in call.shapes:
        return None
    return Pointer(arg=arg, offset=offset, type=TYPES[call.dtypes[arg]])


def stored(arg: str, name: str, type: str) -> Pointer:
    """A stored field of a matrix weight, e.g. `stored("w", "data", "bf16")`."""
    return Pointer(arg=arg, field=name, type=type)


def workspace(type: str, offset: int = 0) -> Pointer:
    return Pointer(arg=WORKSPACE, offset=offset, type=type)


def counters() -> Pointer:
    """int32 semaphores, zero when a launch starts and to be left zero; shared by all nodes."""
    return Pointer(arg=COUNTERS, type="i32")


def launch(
    function: str,
    grid: tuple[int, int, int],
    *,
    warps: int = 4,
    stages: int = 3,
    ctas: int = 1,
    registers: int = 0,
    **arguments: Slot | Constant,
) -> Launch:
    """A Triton launch. Arguments go by the function's parameter names: slots become parameters,
    everything else is a compile-time constant."""
    slots: dict[str, Slot] = {}
    constants: dict[str, Constant] = {}
    for name, value in arguments.items():
        if isinstance(value, Pointer | Number | Descriptor):
            slots[name] = value
        else:
            constants[name] = value
    return Launch(
        slots=slots,
        grid=grid,
        source=Source(
            function=function,
            signature=tuple((name, signature(slot)) for name, slot in slots.items()),
            constants=tuple(constants.items()),
            warps=warps,
            stages=stages,
            ctas=ctas,
            registers=registers,
        ),
    )


def signature(slot: Slot) -> str:
    """A parameter's type as Triton spells it."""
    if isinstance(slot, Pointer):
        return f"*{slot.type}"
    if isinstance(slot, Number):
        return slot.type
    return f"tensordesc<{slot.type}[{', '.join(map(str, slot.block))}]>"
