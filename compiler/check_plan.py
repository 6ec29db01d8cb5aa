"""The plan verifier: runs a launch plan on paper, byte range by byte range, and refuses what a
kernel must not be handed.

Comes in: a plan, the program and nodes it was made from, the sizes of the arenas. It uses none of
the planner's own results: who owns which bytes is worked out again from the addresses in the plan.
Called by the pipeline after `record` and by `inspect verify`.
"""

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compiler.errors import ProgramError
from compiler.lower import Node, bucket_sizes, label, launch_labels, node_workspace
from compiler.memory import ALIGN, value_bytes
from compiler.program import Program
from compiler.record import KIND_ARENA, PACK, Binaries, code_path, counters_bytes, value_of
from kernels.launch import COUNTERS, WORKSPACE, Descriptor, Launch, Number, Pointer, Slot
from kernels.op import OPS
from runtime.artifact import (
    ARENAS,
    FLAG_PROGRAMMATIC,
    PARAM,
    PARAM_ADDRESS,
    PARAM_BYTES,
    PARAM_TENSORMAP,
    LaunchPlan,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaSizes:
    """`state`: offsets by value name; `fields`: offset and size of every stored field."""

    weights: int
    state: Mapping[str, int]
    pages_offset: int
    work: int
    fields: Mapping[str, tuple[int, int]]


class Owners:
    """Which value last wrote every byte of an arena: disjoint ranges, sorted."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ranges: list[tuple[int, int, str]] = []

    def write(self, start: int, end: int, name: str) -> None:
        low, high = self._span(start, end)
        kept: list[tuple[int, int, str]] = []
        for s, e, owner in self.ranges[low:high]:
            if s < start:
                kept.append((s, start, owner))
            if e > end:
                kept.append((end, e, owner))
        kept = sorted([*kept, (start, end, name)])
        self.ranges[low:high] = kept
        self.starts[low:high] = [s for s, _, _ in kept]

    def of(self, start: int, end: int) -> set[str]:
        """Owners of [start, end); "" where nothing was written."""
        low, high = self._span(start, end)
        covered = sum(min(e, end) - max(s, start) for s, e, _ in self.ranges[low:high])
        return {owner for _, _, owner in self.ranges[low:high]} | (
            {""} if covered < end - start else set()
        )

    def _span(self, start: int, end: int) -> tuple[int, int]:
        low = bisect.bisect_right(self.starts, start)
        if low and self.ranges[low - 1][1] > start:
            low -= 1
        return low, bisect.bisect_left(self.starts, end)


def check_plan(
    plan: LaunchPlan,
    program: Program,
    nodes: Sequence[Node],
    sizes: ArenaSizes,
    binaries: Binaries,
) -> LaunchPlan:
    wanted = tuple(name for node in nodes for name in launch_labels(node))
    if len(plan.nodes) != len(wanted) or plan.header.labels != wanted:
        raise ProgramError(
            f"plan {plan.header.bucket.name}: {len(plan.nodes)} nodes for {len(wanted)} launches, "
            "or other labels"
        )
    work = Owners()
    first = 0
    for index, node in enumerate(nodes):
        _Check(plan, program, node, index, first, sizes, binaries, work).run()
        first += len(node.launches)
    return plan


class _Check:
    """One call: decodes the parameters of its launches, then replays what they read and write of
    the work arena. `first`: the plan's node of its first launch."""

    def __init__(
        self,
        plan: LaunchPlan,
        program: Program,
        node: Node,
        index: int,
        first: int,
        sizes: ArenaSizes,
        binaries: Binaries,
        work: Owners,
    ) -> None:
        self.plan, self.program, self.node, self.index = plan, program, node, index
        self.first, self.sizes, self.binaries, self.work = first, sizes, binaries, work
        self.io = {field.name: field for field in plan.header.io}
        self.reads: dict[str, tuple[int, int]] = {}
        self.writes: dict[str, tuple[int, int]] = {}
        self.at = first

    def fail(self, message: str) -> ProgramError:
        where = f"plan {self.plan.header.bucket.name}, node {self.at}"
        return ProgramError(f"{where} ({label(self.node.call)}): {message}")

    def run(self) -> None:
        for self.at, launch in enumerate(self.node.launches, self.first):  # noqa: B020
            self.check_launch(launch)
        self.replay(self.reads, self.writes)

    def check_launch(self, launch: Launch) -> None:
        row = self.plan.nodes[self.at]
        ref = self.plan.header.kernels[int(row["kernel"])]
        binary = None if launch.source is None else self.binaries[launch.source]
        entry = launch.entry if binary is None else binary.entry
        file = "cpu" if binary is None else code_path(binary)
        if (ref.file, ref.entry) != (file, entry):
            raise self.fail(f"calls {ref.entry} of {ref.file}, lowered to {entry} of {file}")
        count = len(launch.slots) if binary is None else len(binary.parameters)
        if int(row["params"]) != count:
            raise self.fail(
                f"{int(row['params'])} parameters, {self.node.kernel.name} declares {count}"
            )
        start = int(row["first_param"])
        params = [_Param(p) for p in self.plan.params[start : start + count]]
        if binary is None:
            for (name, slot), param in zip(launch.slots.items(), params, strict=True):
                self.check_slot(name, slot, param, 8)
            return
        x, y, z = launch.grid
        geometry = ((x * binary.cluster, y, z), (binary.block, 1, 1), (binary.cluster, 1, 1))
        found = tuple(tuple(int(n) for n in row[key]) for key in ("grid", "block", "cluster"))
        if found != geometry or int(row["shared"]) != binary.shared:
            raise self.fail(
                f"grid, block, cluster are {found} with {int(row['shared'])} bytes of shared "
                f"memory, expected {geometry} with {binary.shared}"
            )
        if bool(int(row["flags"]) & FLAG_PROGRAMMATIC) != (binary.pdl and self.at > 0):
            raise self.fail(f"flags are {int(row['flags'])}, the binary waits itself: {binary.pdl}")
        for parameter, param in zip(binary.parameters, params, strict=True):
            if parameter.kind in ("scratch", "null"):
                self.check_bytes(parameter.kind, param, bytes(parameter.size))
                continue
            given = launch.slots[parameter.name]
            if parameter.kind in ("shape", "stride"):
                assert isinstance(given, Descriptor)
                axes = given.shape if parameter.kind == "shape" else given.strides
                value = axes[parameter.axis].to_bytes(parameter.size, "little")
                self.check_bytes(f"{parameter.name} {parameter.kind}", param, value)
            else:
                self.check_slot(parameter.name, given, param, parameter.size)

    def check_slot(self, name: str, slot: Slot, param: _Param, size: int) -> None:
        if isinstance(slot, Number):
            self.check_bytes(name, param, struct.pack(PACK[slot.type], slot.value))
            return
        if param.size != size:
            raise self.fail(f"{name} takes {param.size} bytes, expected {size}")
        if isinstance(slot, Pointer):
            self.check_address(name, slot, param, 1)
            return
        if param.kind != PARAM_TENSORMAP:
            raise self.fail(f"{name} has the parameter kind {param.kind}, expected a tensor map")
        map = self.plan.header.tensormaps[param.aux]
        if (map.shape, map.strides) != (slot.shape, slot.strides):
            raise self.fail(f"{name} maps {map.shape} by {map.strides}, expected {slot}")
        last = sum((n - 1) * step for n, step in zip(map.shape, map.strides, strict=True))
        place = _Param.at(PARAM_ADDRESS, map.arena, map.offset)
        self.check_address(name, slot, place, (last + 1) * map.element_size)

    def check_bytes(self, name: str, param: _Param, expected: bytes) -> None:
        value = int.from_bytes(expected, "little")
        if (param.kind, param.size, param.value) != (PARAM_BYTES, len(expected), value):
            raise self.fail(f"{name} is {param.value:#x}, expected {value:#x}")

    def check_address(
        self, name: str, slot: Pointer | Descriptor, param: _Param, extent: int
    ) -> None:
        """`extent`: bytes from the address on that must belong to the argument."""
        value_name = value_of(self.node, slot.arg)
        key = f"{value_name}.{slot.field or 'data'}"
        scratch, counters = slot.arg == WORKSPACE, slot.arg == COUNTERS
        known = (
            key in self.sizes.fields
            or value_name is None
            or self.program.values[value_name].kind != "weight"
        )
        if (
            (scratch and not self.node.workspace)
            or (not scratch and not counters and value_name is None)
            or (slot.field and not known)
        ):
            if (param.kind, param.value) != (PARAM_BYTES, 0):
                raise self.fail(f"{name} is absent, but its slot holds {param.value:#x}")
            return
        if param.kind != PARAM_ADDRESS:
            raise self.fail(f"{name} has the parameter kind {param.kind}, expected an address")
        start = param.value - slot.offset
        base = _Param.at(param.kind, param.arena, start)
        reserved = counters_bytes(bool(self.binaries))

        def room(size: int) -> None:
            if slot.offset + extent > size:
                raise self.fail(f"{name} reaches byte {slot.offset + extent} of {size}")

        if counters:
            room(reserved)
            self.inside(name, base, "work", reserved, reserved)
            return
        if scratch:
            room(self.node.workspace)
            self.inside(name, base, "work", self.node.workspace, self.sizes.work, reserved)
            span = (start, start + self.node.workspace)
            self.writes[node_workspace(self.index)] = span
            return
        assert value_name is not None
        value = self.program.values[value_name]
        arena = KIND_ARENA[value.kind]
        if value.kind == "weight":
            offset, size = self.sizes.fields[key]
            room(size)
            self.inside(name, base, arena, size, self.sizes.weights)
            if start != offset:
                raise self.fail(f"{name} points to {start}, {key} lies at {offset}")
            return
        if value_name == "kv":
            (page,) = value.dims
            assert isinstance(page, int)
            room(page)
            if (base.arena, start) != (ARENAS.index("state"), self.sizes.pages_offset):
                raise self.fail(
                    f"{name} points to {start}, the pages start at {self.sizes.pages_offset}"
                )
            return
        size = value_bytes(self.program, value_name, bucket_sizes(self.plan.header.bucket))
        limit = {
            "work": self.sizes.work,
            "io": self.plan.header.io_bytes,
            "state": self.sizes.pages_offset,
        }[arena]
        room(size)
        self.inside(name, base, arena, size, limit, reserved if arena == "work" else 0)
        if arena == "state" and start != self.sizes.state[value_name]:
            raise self.fail(
                f"{name} points to {start}, the state lies at {self.sizes.state[value_name]}"
            )
        if arena == "io" and start != self.io[value_name].offset:
            raise self.fail(
                f"{name} points to {start}, the io field lies at {self.io[value_name].offset}"
            )
        if arena == "work":
            role = OPS[self.node.call.op].arg(slot.arg).role
            (self.writes if role == "output" else self.reads)[value_name] = (start, start + size)

    def inside(
        self, name: str, record: _Param, arena: str, size: int, limit: int, low: int = 0
    ) -> None:
        if (
            record.arena != ARENAS.index(arena)
            or record.value < low
            or record.value % ALIGN
            or record.value + size > limit
        ):
            raise self.fail(
                f"{name} is {size} bytes at {record.value} of arena {record.arena}, "
                f"expected a multiple of {ALIGN} inside the {limit} bytes of {arena}"
            )

    def replay(self, reads: dict[str, tuple[int, int]], writes: dict[str, tuple[int, int]]) -> None:
        for name, span in reads.items():
            owners = self.work.of(*span)
            if owners != {name}:
                found = ", ".join(sorted(owner or "nothing" for owner in owners))
                raise self.fail(f"reads {name}, but its bytes hold {found}")
        spans = sorted((span, name) for name, span in {**reads, **writes}.items())
        for (one, first), (two, second) in itertools.pairwise(spans):
            if one[1] > two[0] and (first in writes or second in writes):
                raise self.fail(f"{first} and {second} overlap at {two[0]}")
        for name, span in writes.items():
            self.work.write(*span, name)


class _Param:
    """A row of the parameter table as plain integers."""

    def __init__(self, row: object) -> None:
        fields = row.item()  # type: ignore[attr-defined]
        self.kind, self.arena, self.size, self.aux, self.value = (int(f) for f in fields)

    @classmethod
    def at(cls, kind: int, arena: int, value: int) -> _Param:
        return cls(np.array((kind, arena, 8, 0, max(value, 0)), PARAM))
