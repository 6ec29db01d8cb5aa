"""Recording: lowered nodes become a LaunchPlan, a table of kernels and addresses that holds for
ever.

Comes in: nodes of one bucket and the layouts of all arenas. Goes out: the plan and the work bytes
it needs. Called by the pipeline, once per bucket.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compiler.errors import ProgramError
from compiler.lower import Node, label, node_workspace
from compiler.memory import io_layout, place, work_blocks
from compiler.program import Program
from runtime.artifact import (
    ARENAS,
    NODE,
    PARAM,
    PARAM_ADDRESS,
    PARAM_BYTES,
    Bucket,
    KernelRef,
    LaunchPlan,
    PlanHeader,
)

KIND_ARENA = {"weight": "weights", "state": "state", "temp": "work", "input": "io", "output": "io"}
Parameter = tuple[int, int, int]  # kind, arena, value


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Offsets by name: stored fields ("<weight>.<field>") in weights, state values in state."""

    weights: Mapping[str, int]
    state: Mapping[str, int]


def bucket_sizes(bucket: Bucket) -> dict[str, int]:
    return {"tokens": bucket.tokens, "seqs": bucket.seqs, "pages": bucket.pages}


def record(
    program: Program, nodes: Sequence[Node], bucket: Bucket, addresses: Addresses
) -> tuple[LaunchPlan, int]:
    sizes = bucket_sizes(bucket)
    io = io_layout(program, sizes)
    work, work_bytes = place(work_blocks(program, nodes, sizes))
    arenas: dict[str, Mapping[str, int]] = {
        "weights": addresses.weights,
        "state": addresses.state,
        "work": work,
        "io": io.offsets(),
    }
    kernels = list(dict.fromkeys(node.kernel.entry for node in nodes))
    names = {node.kernel.entry: node.kernel.name for node in nodes}
    table = np.zeros(len(nodes), NODE)
    rows: list[Parameter] = []
    for index, node in enumerate(nodes):
        table[index]["kernel"] = kernels.index(node.kernel.entry)
        table[index]["first_param"] = len(rows)
        table[index]["params"] = len(node.kernel.params)
        rows += [parameter(program, node, index, slot, arenas) for slot in node.kernel.params]
    params = np.zeros(len(rows), PARAM)
    params["size"] = 8
    for field, column in zip(("kind", "arena", "value"), zip(*rows, strict=True), strict=True):
        params[field] = column
    header = PlanHeader(
        bucket=bucket,
        io=io.fields,
        upload_bytes=io.upload_bytes,
        io_bytes=io.io_bytes,
        kernels=tuple(KernelRef(file="cpu", entry=entry, name=names[entry]) for entry in kernels),
        labels=tuple(label(node.call) for node in nodes),
    )
    return LaunchPlan(header=header, nodes=table, params=params), work_bytes


def parameter(
    program: Program, node: Node, index: int, slot: str, arenas: Mapping[str, Mapping[str, int]]
) -> Parameter:
    """One slot of `Kernel.params` as (kind, arena, value)."""
    kind, _, name = slot.partition(":")
    if kind == "i64":
        return PARAM_BYTES, 0, int.from_bytes(struct.pack("<q", node.scalars[name]), "little")
    if kind == "f64":
        return PARAM_BYTES, 0, int.from_bytes(struct.pack("<d", node.scalars[name]), "little")
    if kind != "ptr":
        raise ProgramError(
            f"kernel {node.kernel.name} has the parameter {slot!r}; expected ptr:, i64: or f64:"
        )
    if name == "workspace":
        return (
            (PARAM_ADDRESS, ARENAS.index("work"), arenas["work"][node_workspace(index)])
            if node.workspace
            else (PARAM_BYTES, 0, 0)
        )
    arg, _, field = name.partition(".")
    value_name = node.call.ins.get(arg, node.call.outs.get(arg))
    if value_name is None:
        return PARAM_BYTES, 0, 0  # an optional argument that is absent
    value = program.values[value_name]
    key = f"{value_name}.{field or 'data'}" if value.kind == "weight" else value_name
    arena = KIND_ARENA[value.kind]
    if value.kind == "weight" and field and key not in arenas[arena]:
        return PARAM_BYTES, 0, 0  # a field that this storage format does not have
    return PARAM_ADDRESS, ARENAS.index(arena), arenas[arena][key]
