"""Lowering: every call of a program gets the kernel that will run it at one bucket's sizes.

Comes in: a verified program, sizes, storage formats of the weights. Goes out: nodes, or a
CompileError that names the call and why each kernel of the target refuses it. Called by the
pipeline, once per bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compiler.errors import CompileError
from compiler.program import Call, Program, resolve
from kernels.kernel import KERNELS, CallShape, Kernel

WORKSPACE = "workspace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A call bound to a kernel. `workspace` is the scratch it needs, in bytes."""

    call: Call
    shape: CallShape
    kernel: Kernel
    scalars: Mapping[str, int | float]
    workspace: int


def node_workspace(index: int) -> str:
    """Name of node `index`'s scratch in the work arena."""
    return f"{WORKSPACE}.{index}"


def call_shape(
    program: Program, call: Call, sizes: Mapping[str, int], formats: Mapping[str, str]
) -> CallShape:
    names = {**call.ins, **call.outs}
    return CallShape(
        op=call.op,
        shapes={arg: resolve(program.values[name].dims, sizes) for arg, name in names.items()},
        dtypes={arg: program.values[name].dtype for arg, name in names.items()},
        formats={
            arg: formats[name]
            for arg, name in names.items()
            if program.values[name].kind == "weight"
        },
        attrs=call.attrs,
    )


def choose(shape: CallShape, target: str, what: str) -> Kernel:
    """The first kernel in registration order that accepts the call."""
    reasons: list[str] = []
    for kernel in KERNELS[target]:
        if kernel.op != shape.op:
            continue
        reason = kernel.accepts(shape)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise CompileError(
        f"no {target} kernel for {what}: {'; '.join(reasons) or 'none implements the op'}; "
        "choose another dtype, quant or kv"
    )


def lower(
    program: Program, sizes: Mapping[str, int], formats: Mapping[str, str], target: str
) -> tuple[Node, ...]:
    nodes: list[Node] = []
    for call in program.calls:
        shape = call_shape(program, call, sizes, formats)
        kernel = choose(shape, target, label(call))
        nodes.append(
            Node(
                call=call,
                shape=shape,
                kernel=kernel,
                scalars=kernel.scalars(shape),
                workspace=kernel.workspace(shape),
            )
        )
    return tuple(nodes)


def label(call: Call) -> str:
    """What a node computes, for reports and errors: the op and its first result (or the state it
    updates)."""
    return f"{call.op} {next(iter(call.outs.values()), '')}".rstrip()
