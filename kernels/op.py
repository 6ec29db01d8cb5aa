"""The op contract: what a call means, independent of any device.

An `Op` names its arguments and attributes, computes the answer in torch (`reference`, the oracle of
every kernel test and of `compiler.verify`), and tells its cost. Ops live in `kernels/ops/`; the
compiler builds programs from them; kernels in `kernels/cpu` and `kernels/cuda` implement them by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Arg:
    """One argument of an op.

    `role` is input | weight | state | output | inout; `dims` names its axes (`tokens`, `seqs`,
    `pages` are the symbolic ones, every other name is bound by the call); `dtypes` are the accepted
    element types. "float" is the target's activation type (float32 on CPU, the model's dtype on
    CUDA); "float32" alone means that less would lose something (angles, logits).
    """

    name: str
    role: str
    dims: tuple[str, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Work of one call at its bucket's sizes: bytes read and written, floating point operations.
    `read` leaves the weights out: each is read once, and how many bytes that is depends on its
    storage format, which the caller knows."""

    read: int
    written: int
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """`reference(args: dict[str, Tensor | None], attrs) -> dict[str, Tensor]` returns every
    output by name; `inout` and `state` arguments are updated in place and not returned.
    A call need not name optional outputs; then nobody writes them."""

    name: str
    args: tuple[Arg, ...]
    attrs: Mapping[str, type] = field(default_factory=dict)
    reference: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    cost: Callable[[dict[str, tuple[int, ...]], dict[str, Any]], Cost]
    samples: Callable[[], list[Sample]]
    tolerance: Mapping[str, float] = field(
        default_factory=lambda: {"float32": 2e-5, "bfloat16": 2e-2}
    )

    def outputs(self, wanted: Collection[str] = ()) -> set[str]:
        """Names of the outputs of a call that names these optional ones."""
        outs = [a for a in self.args if a.role == "output"]
        return {a.name for a in outs if not a.optional or a.name in wanted}

    def arg(self, name: str) -> Arg:
        for a in self.args:
            if a.name == name:
                return a
        raise KeyError(f"op {self.name} has no argument {name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One test case of an op: concrete arguments and attributes; every kernel that accepts it is
    run on it. `wanted`: optional outputs that the call names."""

    label: str
    args: dict[str, Any]
    attrs: dict[str, Any]
    wanted: tuple[str, ...] = ()


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is registered twice")
    OPS[op.name] = op
    return op
