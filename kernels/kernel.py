"""A kernel: one implementation of one op for one target.

The compiler asks every kernel of the target whether it `accepts` a call, takes the best one, and
records a plan node with the kernel's entry and parameters. Registered in `KERNELS` by the files of
`kernels/cpu` and `kernels/cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kernels.launch import Launch, Number, Pointer, Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class CallShape:
    """What a kernel sees of a call: argument shapes at the bucket's sizes (dims already
    numbers), dtypes, attributes and, for weights, the storage format (`float32`, `bfloat16`,
    `int8g32`, `int4g64`, …). Absent optional arguments are not listed. `kind` of the bucket: in
    `decode` every sequence has exactly one token, in `mixed` any number."""

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    formats: Mapping[str, str]
    attrs: Mapping[str, Any]
    kind: str = "mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """`params` is the ordered parameter layout of `entry`, each named once; a slot is eight bytes
    on CPU:

    - `"ptr:<arg>"`            address of an argument (0 when an optional argument is absent)
    - `"ptr:<arg>.<field>"`    address of a stored field of a matrix weight (`w.data`, `w.scale`)
    - `"ptr:workspace"`        scratch of `workspace(call)` bytes, shared by all threads, dead after
    - `"i64:<name>"`, `"f64:<name>"`  value from `scalars(call)[name]`
    """

    name: str
    op: str
    target: str
    entry: str
    params: tuple[str, ...]
    accepts: Callable[[CallShape], str | None]
    scalars: Callable[[CallShape], dict[str, int | float]] = field(default=lambda call: {})
    workspace: Callable[[CallShape], int] = field(default=lambda call: 0)

    def launch(self, call: CallShape) -> Launch:
        """The call as one entry of the native library; slots by their spelling in `params`."""
        values = self.scalars(call)
        slots: dict[str, Slot] = {}
        for param in self.params:
            kind, _, name = param.partition(":")
            if kind == "ptr":
                arg, _, part = name.partition(".")
                slots[param] = Pointer(arg=arg, field=part)
            elif kind in NUMBERS:
                slots[param] = Number(type=NUMBERS[kind], value=values[name])
            else:
                raise ValueError(
                    f"kernel {self.name} has the parameter {param!r}; expected ptr:, i64: or f64:"
                )
        return Launch(entry=self.entry, slots=slots)


NUMBERS = {"i64": "i64", "f64": "fp64"}

# "cpu": Kernel, "cuda": kernels.cuda.kernel.CudaKernel
KERNELS: dict[str, list[Any]] = {"cpu": [], "cuda": []}


def register(kernel: Kernel) -> Kernel:
    if len(set(kernel.params)) != len(kernel.params):
        raise ValueError(f"kernel {kernel.name!r} names a parameter twice: {kernel.params}")
    if any(k.name == kernel.name for k in KERNELS[kernel.target]):
        raise ValueError(f"kernel {kernel.name!r} is registered twice for {kernel.target}")
    KERNELS[kernel.target].append(kernel)
    return kernel
