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

from compiler.errors import ProgramError
from compiler.lower import Node, label, node_workspace
from compiler.memory import ALIGN, value_bytes
from compiler.program import Program
from compiler.record import KIND_ARENA, bucket_sizes
from kernels.op import OPS
from runtime.artifact import ARENAS, PARAM_ADDRESS, PARAM_BYTES, LaunchPlan


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
    plan: LaunchPlan, program: Program, nodes: Sequence[Node], sizes: ArenaSizes
) -> LaunchPlan:
    if len(plan.nodes) != len(nodes) or plan.header.labels != tuple(
        label(node.call) for node in nodes
    ):
        raise ProgramError(
            f"plan {plan.header.bucket.name}: {len(plan.nodes)} nodes for {len(nodes)} calls, "
            "or other labels"
        )
    work = Owners()
    for index, node in enumerate(nodes):
        _Check(plan, program, node, index, sizes, work).run()
    return plan


class _Check:
    """One node: decodes its parameters, then replays its reads and writes of the work arena."""

    def __init__(
        self,
        plan: LaunchPlan,
        program: Program,
        node: Node,
        index: int,
        sizes: ArenaSizes,
        work: Owners,
    ) -> None:
        self.plan, self.program, self.node, self.index, self.sizes, self.work = (
            plan,
            program,
            node,
            index,
            sizes,
            work,
        )
        self.io = {field.name: field for field in plan.header.io}

    def fail(self, message: str) -> ProgramError:
        where = f"plan {self.plan.header.bucket.name}, node {self.index}"
        return ProgramError(f"{where} ({label(self.node.call)}): {message}")

    def run(self) -> None:
        row = self.plan.nodes[self.index]
        kernel = self.node.kernel
        ref = self.plan.header.kernels[int(row["kernel"])]
        if ref.entry != kernel.entry:
            raise self.fail(f"calls {ref.entry}, lowered to {kernel.entry}")
        if int(row["params"]) != len(kernel.params):
            raise self.fail(
                f"{int(row['params'])} parameters, {kernel.name} declares {len(kernel.params)}"
            )
        first = int(row["first_param"])
        reads: dict[str, tuple[int, int]] = {}
        writes: dict[str, tuple[int, int]] = {}
        for slot, param in zip(
            kernel.params, self.plan.params[first : first + len(kernel.params)], strict=True
        ):
            kind, _, name = slot.partition(":")
            if kind in ("i64", "f64"):
                self.check_scalar(kind, name, param)
            else:
                self.check_address(name, param, reads, writes)
        self.replay(reads, writes)

    def check_scalar(self, kind: str, name: str, param: object) -> None:
        record = _Param(param)
        expected = struct.pack("<q" if kind == "i64" else "<d", self.node.scalars[name])
        if (
            record.kind != PARAM_BYTES
            or record.size != 8
            or record.value.to_bytes(8, "little") != expected
        ):
            raise self.fail(
                f"{kind}:{name} is {record.value:#x}, expected {self.node.scalars[name]}"
            )

    def check_address(
        self,
        name: str,
        param: object,
        reads: dict[str, tuple[int, int]],
        writes: dict[str, tuple[int, int]],
    ) -> None:
        record, (arg, _, field) = _Param(param), name.partition(".")
        value_name = self.node.call.ins.get(arg, self.node.call.outs.get(arg))
        scratch = name == "workspace"
        key = f"{value_name}.{field or 'data'}"
        known = (
            key in self.sizes.fields
            or value_name is None
            or self.program.values[value_name].kind != "weight"
        )
        if (
            (scratch and not self.node.workspace)
            or (not scratch and value_name is None)
            or (field and not known)
        ):
            if (record.kind, record.value) != (PARAM_BYTES, 0):
                raise self.fail(f"ptr:{name} is absent, but its slot holds {record.value:#x}")
            return
        if record.kind != PARAM_ADDRESS:
            raise self.fail(f"ptr:{name} has the parameter kind {record.kind}, expected an address")
        start = record.value
        if scratch:
            self.inside(name, record, "work", self.node.workspace, self.sizes.work)
            writes[node_workspace(self.index)] = (start, start + self.node.workspace)
            return
        assert value_name is not None
        value = self.program.values[value_name]
        arena = KIND_ARENA[value.kind]
        if value.kind == "weight":
            offset, size = self.sizes.fields[key]
            self.inside(name, record, arena, size, self.sizes.weights)
            if start != offset:
                raise self.fail(f"ptr:{name} points to {start}, {key} lies at {offset}")
            return
        if value_name == "kv":
            if (record.arena, start) != (ARENAS.index("state"), self.sizes.pages_offset):
                raise self.fail(
                    f"ptr:{name} points to {start}, the pages start at {self.sizes.pages_offset}"
                )
            return
        size = value_bytes(self.program, value_name, bucket_sizes(self.plan.header.bucket))
        limit = {
            "work": self.sizes.work,
            "io": self.plan.header.io_bytes,
            "state": self.sizes.pages_offset,
        }[arena]
        self.inside(name, record, arena, size, limit)
        if arena == "state" and start != self.sizes.state[value_name]:
            raise self.fail(
                f"ptr:{name} points to {start}, the state lies at {self.sizes.state[value_name]}"
            )
        if arena == "io" and start != self.io[value_name].offset:
            raise self.fail(
                f"ptr:{name} points to {start}, the io field lies at {self.io[value_name].offset}"
            )
        if arena == "work":
            role = OPS[self.node.call.op].arg(arg).role
            (writes if role == "output" else reads)[value_name] = (start, start + size)

    def inside(self, name: str, record: _Param, arena: str, size: int, limit: int) -> None:
        if (
            record.arena != ARENAS.index(arena)
            or record.value % ALIGN
            or record.value + size > limit
        ):
            raise self.fail(
                f"ptr:{name} is {size} bytes at {record.value} of arena {record.arena}, "
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
        self.kind, self.arena, self.size, _, self.value = (int(f) for f in fields)
