"""Header of one safetensors file, read as hostile input: every length, offset and shape is checked
against the file's size before anything is mapped. Goes out: name -> Entry (dtype, shape, byte
range). Called by `compiler.checkpoint`.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.errors import DamagedCheckpoint

MAX_HEADER = 100 << 20
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """`start` and `end` are offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_entries(path: Path) -> dict[str, Entry]:
    """All tensors of the file. They must tile its data section exactly: no gap, overlap, duplicate
    or trailing byte.
    """

    def bad(what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{path}: {what}; download the file again")

    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(b"version "):
            raise DamagedCheckpoint(
                f"{path}: is a Git LFS pointer, not weights; run `git lfs pull`"
            )
        if len(head) < 8:
            raise bad(f"{size} bytes are too few for a safetensors file")
        (length,) = struct.unpack("<Q", head)
        if length > min(size - 8, MAX_HEADER):
            raise bad(f"header of {length} bytes does not fit the file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise bad(f"header is not valid JSON ({e})") from None
    if not isinstance(header, dict):
        raise bad("header is not a JSON object")
    header.pop("__metadata__", None)
    base = 8 + length
    entries: dict[str, Entry] = {}
    for name, info in header.items():
        entry = _entry(info, base)
        if isinstance(entry, str):
            raise bad(f"tensor {name!r}: {entry}")
        entries[name] = entry
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != position:
            kind = "overlaps the one before" if entry.start < position else "leaves a gap before"
            raise bad(f"tensor {name!r} at byte {entry.start} {kind} it, expected {position}")
        position = entry.end
    if position != size:
        raise bad(f"tensors end at byte {position}, the file at {size}")
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return result


def _entry(info: Any, base: int) -> Entry | str:
    """The checked entry, or what is wrong with it."""
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        return "needs exactly dtype, shape and data_offsets"
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"unknown dtype {dtype!r}"
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        return f"shape {shape!r} or offsets {offsets!r} are not lists of natural numbers"
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if needed == 0:
        return f"shape {shape} is empty"
    if offsets[1] - offsets[0] != needed:
        return (
            f"shape {shape} of {dtype} needs {needed} bytes, offsets give {offsets[1] - offsets[0]}"
        )
    return Entry(dtype=dtype, shape=tuple(shape), start=base + offsets[0], end=base + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
