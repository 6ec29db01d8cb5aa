"""Where everything lives: offsets in the work, io, state and weights arenas.

Comes in: a program at a bucket's sizes, or sizes of stored fields. Goes out: offsets, all multiples
of ALIGN, the same for the same input. Called by `record` (work, io), `pipeline` (state) and `pack`
(weights).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compiler.lower import Node, node_workspace
from compiler.model import INPUTS, OUTPUTS, StepShape
from compiler.program import Program, resolve
from runtime import weights_file
from runtime.artifact import IoField, StateLayout, TensorEntry

ALIGN = 64  # one cache line, one vector register
PAGE = 4096
ITEMSIZE = {"int32": 4, "int64": 8, "float32": 4, "bfloat16": 2, "uint8": 1}


def aligned(size: int, to: int = ALIGN) -> int:
    return -(-size // to) * to


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`size` bytes that must stay untouched from node `first` to node `last`, both included."""

    name: str
    size: int
    first: int
    last: int


def place(blocks: Iterable[Block]) -> tuple[dict[str, int], int]:
    """Offsets and the arena's size: largest block first, each at the lowest free offset among
    the blocks alive with it."""
    placed: list[tuple[int, Block]] = []  # by offset
    for block in sorted(blocks, key=lambda b: (-b.size, b.first, b.name)):
        offset = 0
        for start, other in placed:
            alive = other.first <= block.last and block.first <= other.last
            if (
                alive
                and start < offset + aligned(block.size)
                and offset < start + aligned(other.size)
            ):
                offset = start + aligned(other.size)
        bisect.insort(placed, (offset, block), key=lambda p: p[0])
    return {b.name: offset for offset, b in placed}, max(
        (offset + aligned(b.size) for offset, b in placed), default=0
    )


def work_blocks(program: Program, nodes: Sequence[Node], sizes: Mapping[str, int]) -> list[Block]:
    """Temps from the node that writes them to the last that reads them; workspaces during their
    node."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    blocks: list[Block] = []
    for index, node in enumerate(nodes):
        for name in (*node.call.ins.values(), *node.call.outs.values()):
            if program.values[name].kind == "temp":
                first.setdefault(name, index)
                last[name] = index
        if node.workspace:
            blocks.append(
                Block(name=node_workspace(index), size=node.workspace, first=index, last=index)
            )
    return blocks + [
        Block(name=n, size=value_bytes(program, n, sizes), first=first[n], last=last[n])
        for n in first
    ]


def value_bytes(program: Program, name: str, sizes: Mapping[str, int]) -> int:
    value = program.values[name]
    return int(np.prod(resolve(value.dims, sizes), dtype=np.int64)) * ITEMSIZE[value.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class IoLayout:
    fields: tuple[IoField, ...]
    upload_bytes: int
    io_bytes: int

    def offsets(self) -> dict[str, int]:
        return {field.name: field.offset for field in self.fields}


def io_layout(program: Program, sizes: Mapping[str, int]) -> IoLayout:
    """Inputs in upload order (`masks` first, `edits` last), then outputs."""
    fields: list[IoField] = []
    end = upload = 0
    for name in ("masks", *INPUTS, "edits", *OUTPUTS):
        if name not in program.values:
            continue  # an input this model has no use for
        value = program.values[name]
        if value.kind == "output" and not upload:
            upload = end
        fields.append(
            IoField(
                name=name,
                dtype=value.dtype,
                shape=resolve(value.dims, sizes),
                offset=end,
                output=value.kind == "output",
            )
        )
        end = aligned(end + value_bytes(program, name, sizes))
    return IoLayout(fields=tuple(fields), upload_bytes=upload, io_bytes=end)


def state_layout(program: Program, shape: StepShape) -> tuple[StateLayout, dict[str, int]]:
    """Token state, then the pages; the offset of `kv` is that of the first page."""
    offsets: dict[str, int] = {}
    end = 0
    for name in ("last_token", "counts", "bias"):
        if name not in program.values:
            continue  # a pooled model counts nothing
        offsets[name] = end
        end = aligned(end + value_bytes(program, name, {"tokens": 0, "seqs": 0, "pages": 0}))
    offsets["kv"] = aligned(end, PAGE)
    (page_bytes,) = resolve(program.values["kv"].dims, {"tokens": 0, "seqs": 0, "pages": 0})
    layout = StateLayout(
        slots=shape.slots,
        page_size=shape.page_size,
        page_bytes=page_bytes,
        pages_offset=offsets["kv"],
        kv_dtype=shape.kv_dtype,
    )
    return layout, offsets


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One array of the weights file before it has an offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def weights_layout(stored: Sequence[Stored]) -> tuple[TensorEntry, ...]:
    """Entries with offsets (checksums still 0) in the given order, gaps filled by padding
    entries."""
    entries: list[TensorEntry] = []
    end = 0

    def append(name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
        nonlocal end
        entries.append(
            TensorEntry(name=name, dtype=dtype, shape=shape, offset=end, size=size, crc32c=0)
        )
        end += size

    def pad(to: int) -> None:
        if gap := aligned(end, to) - end:
            append(f"{weights_file.PADDING}{end}", "uint8", (gap,), gap)

    for array in stored:
        size = int(np.prod(array.shape, dtype=np.int64)) * weights_file.itemsize(array.dtype)
        pad(PAGE if size >= PAGE else ALIGN)
        append(array.name, array.dtype, array.shape, size)
    pad(PAGE)
    return tuple(entries)


__all__ = [
    "ALIGN",
    "Block",
    "IoLayout",
    "Stored",
    "aligned",
    "io_layout",
    "place",
    "state_layout",
    "value_bytes",
    "weights_layout",
    "work_blocks",
]
