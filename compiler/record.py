"""Recording: lowered nodes become a LaunchPlan, a table of kernels and addresses that holds for
ever.

Comes in: nodes of one bucket, the binaries of their sources and the layouts of all arenas. Goes
out: the plan and the work bytes it needs. Called by the pipeline, once per bucket.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compiler.binaries import PACK, code_path, tensor_map
from compiler.errors import ProgramError
from compiler.lower import Node, bucket_sizes, launch_labels, node_workspace
from compiler.memory import Block, io_layout, place, work_blocks
from compiler.program import Program
from kernels.launch import (
    COUNTERS,
    COUNTERS_BYTES,
    WORKSPACE,
    Binary,
    Descriptor,
    Launch,
    Number,
    Parameter,
    Pointer,
    Source,
)
from runtime.artifact import (
    ARENAS,
    FLAG_PROGRAMMATIC,
    NODE,
    PARAM,
    PARAM_ADDRESS,
    PARAM_BYTES,
    PARAM_TENSORMAP,
    Bucket,
    KernelRef,
    LaunchPlan,
    PlanHeader,
    TensorMap,
)

KIND_ARENA = {"weight": "weights", "state": "state", "temp": "work", "input": "io", "output": "io"}
Row = tuple[int, int, int, int, int]  # a parameter: kind, arena, size, aux, value
Binaries = Mapping[Source, Binary]  # empty on CPU, where one library holds every entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Offsets by name: stored fields ("<weight>.<field>") in weights, state values in state."""

    weights: Mapping[str, int]
    state: Mapping[str, int]


def counters_bytes(device: bool) -> int:
    """Semaphores at the start of the work arena; the CPU (not a `device`) has none."""
    return COUNTERS_BYTES if device else 0


def work_layout(blocks: Iterable[Block], device: bool) -> tuple[dict[str, int], int]:
    """Offsets in the work arena, behind the counters, and the arena's size."""
    reserved = counters_bytes(device)
    offsets, size = place(blocks)
    return {name: offset + reserved for name, offset in offsets.items()}, size + reserved


def record(
    program: Program,
    nodes: Sequence[Node],
    bucket: Bucket,
    addresses: Addresses,
    binaries: Binaries,
) -> tuple[LaunchPlan, int]:
    sizes = bucket_sizes(bucket)
    io = io_layout(program, sizes)
    work, work_bytes = work_layout(work_blocks(program, nodes, sizes), bool(binaries))
    arenas: dict[str, Mapping[str, int]] = {
        "weights": addresses.weights,
        "state": addresses.state,
        "work": work,
        "io": io.offsets(),
    }
    launches = [(index, launch) for index, node in enumerate(nodes) for launch in node.launches]
    refs = [_reference(nodes[index], launch, binaries) for index, launch in launches]
    kernels = list(dict.fromkeys(refs))
    table = np.zeros(len(launches), NODE)
    rows: list[Row] = []
    maps: list[TensorMap] = []
    for position, (index, launch) in enumerate(launches):
        row = table[position]
        row["kernel"] = kernels.index(refs[position])
        row["first_param"] = len(rows)
        rows += _Parameters(program, nodes[index], index, launch, arenas, binaries, maps).rows()
        row["params"] = len(rows) - int(row["first_param"])
        if launch.source is not None:
            binary = binaries[launch.source]
            x, y, z = launch.grid
            row["grid"], row["block"] = (x * binary.cluster, y, z), (binary.block, 1, 1)
            row["cluster"], row["shared"] = (binary.cluster, 1, 1), binary.shared
            if binary.pdl and position:
                row["flags"] = FLAG_PROGRAMMATIC
    params = np.zeros(len(rows), PARAM)
    columns = ("kind", "arena", "size", "aux", "value")
    for field, column in zip(columns, zip(*rows, strict=True), strict=True):
        params[field] = column
    header = PlanHeader(
        bucket=bucket,
        io=io.fields,
        upload_bytes=io.upload_bytes,
        io_bytes=io.io_bytes,
        kernels=tuple(kernels),
        labels=tuple(name for node in nodes for name in launch_labels(node)),
        tensormaps=tuple(maps),
    )
    return LaunchPlan(header=header, nodes=table, params=params), work_bytes


def _reference(node: Node, launch: Launch, binaries: Binaries) -> KernelRef:
    if launch.source is None:
        return KernelRef(file="cpu", entry=launch.entry, name=node.kernel.name)
    binary = binaries[launch.source]
    return KernelRef(file=code_path(binary), entry=binary.entry, name=node.kernel.name)


def value_of(node: Node, arg: str) -> str | None:
    """The program's value for an argument, None for an optional one that is absent."""
    return node.call.ins.get(arg, node.call.outs.get(arg))


class _Parameters:
    """The parameters of one launch, in ABI order, as rows of the plan's table."""

    def __init__(
        self,
        program: Program,
        node: Node,
        index: int,
        launch: Launch,
        arenas: Mapping[str, Mapping[str, int]],
        binaries: Binaries,
        maps: list[TensorMap],
    ) -> None:
        self.program, self.node, self.index, self.launch = program, node, index, launch
        self.arenas, self.binaries, self.maps = arenas, binaries, maps

    def rows(self) -> Iterator[Row]:
        if self.launch.source is None:
            for slot in self.launch.slots.values():
                if isinstance(slot, Descriptor):
                    raise ProgramError(
                        f"kernel {self.node.kernel.name}: the CPU has no tensor maps"
                    )
                yield self.number(slot, 8) if isinstance(slot, Number) else self.pointer(slot)
            return
        binary = self.binaries[self.launch.source]
        if binary.scratch:
            raise ProgramError(
                f"kernel {self.node.kernel.name} needs {binary.scratch} bytes of global scratch a "
                "program: make tensor descriptors on the host"
            )
        for parameter in binary.parameters:
            yield self.device(parameter, binary)

    def device(self, parameter: Parameter, binary: Binary) -> Row:
        if parameter.kind in ("scratch", "null"):
            return PARAM_BYTES, 0, parameter.size, 0, 0
        slot = self.launch.slots[parameter.name]
        if isinstance(slot, Pointer):
            return self.pointer(slot)
        if isinstance(slot, Number):
            return self.number(slot, parameter.size)
        if parameter.kind == "tensormap":
            return self.descriptor(slot, parameter, binary)
        axes = slot.shape if parameter.kind == "shape" else slot.strides
        return PARAM_BYTES, 0, parameter.size, 0, axes[parameter.axis]

    def number(self, slot: Number, size: int) -> Row:
        data = struct.pack(PACK[slot.type], slot.value)
        if len(data) != size:
            raise ProgramError(
                f"kernel {self.node.kernel.name}: a {slot.type} for a parameter of {size} bytes"
            )
        return PARAM_BYTES, 0, size, 0, int.from_bytes(data, "little")

    def pointer(self, slot: Pointer) -> Row:
        place = self.place(slot)
        if place is None:
            return PARAM_BYTES, 0, 8, 0, 0
        return PARAM_ADDRESS, place[0], 8, 0, place[1]

    def descriptor(self, slot: Descriptor, parameter: Parameter, binary: Binary) -> Row:
        place = self.place(slot)
        if place is None:
            raise ProgramError(f"kernel {self.node.kernel.name}: {slot.arg} is absent")
        map = tensor_map(slot, binary.maps[parameter.name], *place)
        if map not in self.maps:
            self.maps.append(map)
        return PARAM_TENSORMAP, 0, parameter.size, self.maps.index(map), 0

    def place(self, slot: Pointer | Descriptor) -> tuple[int, int] | None:
        """Arena and offset; None for what does not exist."""
        if slot.arg == COUNTERS:
            return ARENAS.index("work"), slot.offset
        if slot.arg == WORKSPACE:
            if not self.node.workspace:
                return None
            offset = self.arenas["work"][node_workspace(self.index)]
            return ARENAS.index("work"), offset + slot.offset
        name = value_of(self.node, slot.arg)
        if name is None:
            return None  # an optional argument that is absent
        value = self.program.values[name]
        arena = KIND_ARENA[value.kind]
        key = f"{name}.{slot.field or 'data'}" if value.kind == "weight" else name
        if value.kind == "weight" and slot.field and key not in self.arenas[arena]:
            return None  # a field that this storage format does not have
        return ARENAS.index(arena), self.arenas[arena][key] + slot.offset
