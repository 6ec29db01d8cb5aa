"""Lowering: every call of a program gets the kernel that will run it at one bucket's sizes, and the
launches of that kernel.

Comes in: a verified program, a bucket, storage formats of the weights, measured choices. Goes out:
nodes, or a CompileError that names the call and why each kernel of the target refuses it. Called by
the pipeline, once per bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compiler.errors import CompileError
from compiler.program import Call, Program, resolve
from compiler.tuned import NO_RECORDS, Records
from kernels.cuda.kernel import CudaKernel
from kernels.kernel import KERNELS, CallShape, Kernel
from kernels.launch import WORKSPACE, Launch
from runtime.artifact import Bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A call bound to a kernel. `workspace` is the scratch its launches share, in bytes; `config`
    the point of a CUDA kernel's search space; `measured`: a tuning record chose it."""

    call: Call
    shape: CallShape
    kernel: Kernel | CudaKernel
    config: Any
    launches: tuple[Launch, ...]
    workspace: int
    measured: bool = False

    @property
    def guessed(self) -> bool:
        """A measurement could have chosen otherwise, and there was none."""
        device = isinstance(self.kernel, CudaKernel) and len(self.kernel.candidates(self.shape)) > 1
        return device and not self.measured


def bucket_sizes(bucket: Bucket) -> dict[str, int]:
    return {"tokens": bucket.tokens, "seqs": bucket.seqs, "pages": bucket.pages}


def node_workspace(index: int) -> str:
    """Name of node `index`'s scratch in the work arena."""
    return f"{WORKSPACE}.{index}"


def call_shape(
    program: Program, call: Call, bucket: Bucket, formats: Mapping[str, str]
) -> CallShape:
    names, sizes = {**call.ins, **call.outs}, bucket_sizes(bucket)
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
        kind=bucket.kind,
    )


def accepting(shape: CallShape, target: str, what: str) -> list[Any]:
    """Kernels that can serve the call, in registration order; never none."""
    found: list[Any] = []
    reasons: list[str] = []
    for kernel in KERNELS[target]:
        if kernel.op == shape.op:
            reason = kernel.accepts(shape)
            if reason is None:
                found.append(kernel)
            else:
                reasons.append(f"{kernel.name}: {reason}")
    if found:
        return found
    raise CompileError(
        f"no {target} kernel for {what}: {'; '.join(reasons) or 'none implements the op'}; "
        "choose another dtype, quant or kv"
    )


def choose(
    shape: CallShape, target: str, what: str, records: Records = NO_RECORDS
) -> tuple[Kernel | CudaKernel, Any, bool]:
    """Kernel and configuration: the measured ones, or those of the first kernel in registration
    order that the heuristic may choose. The last value says which."""
    kernels = accepting(shape, target, what)
    if target == "cpu":
        return kernels[0], None, False
    recorded = records.choice(shape, kernels)
    if recorded is not None:
        return (*recorded, True)
    for kernel in kernels:
        if not kernel.tuned_only:
            return kernel, kernel.default(shape), False
    raise CompileError(
        f"no {target} kernel for {what} without a tuning record: only "
        f"{', '.join(k.name for k in kernels)} accept it; run compiler.tune on the GPU"
    )


def lower(
    program: Program,
    bucket: Bucket,
    formats: Mapping[str, str],
    target: str,
    records: Records = NO_RECORDS,
) -> tuple[Node, ...]:
    nodes: list[Node] = []
    for call in program.calls:
        shape = call_shape(program, call, bucket, formats)
        kernel, config, measured = choose(shape, target, label(call), records)
        if isinstance(kernel, Kernel):
            launches: tuple[Launch, ...] = (kernel.launch(shape),)
            workspace = kernel.workspace(shape)
        else:
            launches = kernel.launches(shape, config)
            workspace = kernel.workspace(shape, config)
        nodes.append(
            Node(
                call=call,
                shape=shape,
                kernel=kernel,
                config=config,
                launches=launches,
                workspace=workspace,
                measured=measured,
            )
        )
    return tuple(nodes)


def label(call: Call) -> str:
    """What a node computes, for reports and errors: the op and its first result (or the state it
    updates)."""
    return f"{call.op} {next(iter(call.outs.values()), '')}".rstrip()


def launch_labels(node: Node) -> list[str]:
    """One label per launch: those of a call with several are numbered."""
    name, count = label(node.call), len(node.launches)
    return [name if count == 1 else f"{name} {i + 1}/{count}" for i in range(count)]
