"""The weights file: a safetensors file whose data section is the weights arena, byte for byte.

Comes in: the manifest's tensor entries. Goes out: the file's one possible header; a reader compares
instead of parsing, so no length or offset in the file is ever believed. The compiler writes with
it, `Artifact` checks with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from runtime.errors import DamagedArtifact
from runtime.manifest import TensorEntry

DATA_ALIGN = 4096  # of the data section in the file: reads into the arena stay page-aligned
PADDING = "pad."  # entries that fill the gaps between aligned tensors; safetensors allows no holes
_TYPES = {
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "int32": ("I32", 4),
    "uint32": ("U32", 4),
}


def itemsize(dtype: str) -> int:
    return _TYPES[dtype][1]


def header(tensors: Sequence[TensorEntry]) -> bytes:
    """Length prefix and JSON, padded with spaces so that the data section starts at a multiple
    of DATA_ALIGN."""
    table = {
        t.name: {
            "dtype": _TYPES[t.dtype][0],
            "shape": t.shape,
            "data_offsets": (t.offset, t.offset + t.size),
        }
        for t in tensors
    }
    text = msgspec.json.encode(table)
    text += b" " * (-(8 + len(text)) % DATA_ALIGN)
    return len(text).to_bytes(8, "little") + text


def check_tensors(tensors: Sequence[TensorEntry], total: int) -> None:
    """The entries tile [0, total) in order, each as large as its shape says; names are unique."""
    end, names = 0, set[str]()
    for t in tensors:
        if t.dtype not in _TYPES:
            raise DamagedArtifact(
                f"tensor {t.name}: expected a dtype of {', '.join(_TYPES)}, found {t.dtype}"
            )
        size = itemsize(t.dtype)
        for d in t.shape:
            size *= d
        if t.name in names or min(t.shape, default=1) < 0:
            raise DamagedArtifact(
                f"tensor {t.name}: expected one entry with sizes of 0 or more, "
                f"found {list(t.shape)} or a second"
            )
        if t.offset != end or t.size != size:
            raise DamagedArtifact(
                f"tensor {t.name}: expected {size} bytes at {end}, found {t.size} at {t.offset}"
            )
        names.add(t.name)
        end += size
    if end != total:
        raise DamagedArtifact(f"weights: expected {total} bytes in all tensors, found {end}")
