"""Launch plans: what runs for one bucket, as data, and its file format.

Comes in: a LaunchPlan from the compiler, or the bytes of a plan file. Goes out: the other of the
two. A plan file is the magic, the lengths of the three tables, a msgpack header, the node table,
the parameter table and a CRC-32 of all of it; every length and index in it is treated as hostile.
Types are re-exported by `runtime.artifact`.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Any

import msgspec
import numpy as np

from runtime.errors import DamagedArtifact

ARENAS = ("weights", "state", "work", "io")
MAGIC = b"HSPLAN1\0"
_LENGTHS = struct.Struct("<III")  # header bytes, nodes, params


class IoField(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One array of a bucket's io block: `offset` in bytes from the start of the io arena,
    `shape` at the bucket's sizes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    output: bool = False


class KernelRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`file` is a manifest path under code/, described in Manifest.kernels (on CPU `cpu`: the
    library chosen at load); `entry` the symbol in it."""

    file: str
    entry: str
    name: str


class Bucket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes one plan serves: at most `tokens` flat tokens, `seqs` sequences and logit rows,
    `pages` page-table columns. `kind`: in a `decode` bucket every sequence has exactly one token,
    in a `mixed` one any number."""

    name: str
    tokens: int
    seqs: int
    pages: int
    kind: str = "mixed"


class TensorMap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TMA descriptor, encoded at load. `arena`: index into ARENAS; `shape`, `strides` in
    elements and `box`, outermost axis first (the last stride is 1); `element_type` and `swizzle`
    are the driver's codes. Elements outside read as zero."""

    arena: int
    offset: int
    element_type: int
    element_size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


class PlanHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    bucket: Bucket
    io: tuple[IoField, ...]
    upload_bytes: int  # inputs are io[0:upload_bytes]; outputs follow
    io_bytes: int
    kernels: tuple[KernelRef, ...]
    labels: tuple[str, ...]  # one per node: what it computes, for reports and errors
    late: tuple[str, ...] = ()  # names of values known at load
    tensormaps: tuple[TensorMap, ...] = ()


def node_kind(label: str) -> str:
    """A node's label without the number of its layer: `linear *.qkv`."""
    return re.sub(r"\d+", "*", label)


# Plan tables. A parameter is Bytes (value is the `size` little-endian bytes), Address (arena,
# value = offset), Late (aux = index into PlanHeader.late) or, on CUDA, TensorMap (aux = index into
# PlanHeader.tensormaps). Parameters of a node stand in ABI order.
PARAM_BYTES, PARAM_ADDRESS, PARAM_LATE, PARAM_TENSORMAP = 0, 1, 2, 3
PARAM = np.dtype(
    [("kind", "<u1"), ("arena", "<u1"), ("size", "<u2"), ("aux", "<u4"), ("value", "<u8")]
)
IO_ITEMSIZE = {"int32": 4, "float32": 4, "int64": 8}
# NODE flags. The node may start before the one before it has ended: it waits itself before it
# touches anything (a programmatic edge of the graph).
FLAG_PROGRAMMATIC = 1
NODE = np.dtype(
    [
        ("kernel", "<u4"),
        ("first_param", "<u4"),
        ("params", "<u4"),
        ("grid", "<u4", (3,)),
        ("block", "<u4", (3,)),
        ("cluster", "<u4", (3,)),
        ("shared", "<u4"),
        ("flags", "<u4"),
    ]
)


class LaunchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`nodes` has dtype NODE, `params` dtype PARAM; nodes run in order."""

    header: PlanHeader
    nodes: Any
    params: Any


def encode_plan(plan: LaunchPlan) -> bytes:
    header = msgspec.msgpack.encode(plan.header)
    nodes = np.ascontiguousarray(plan.nodes, NODE)
    params = np.ascontiguousarray(plan.params, PARAM)
    lengths = _LENGTHS.pack(len(header), len(nodes), len(params))
    body = MAGIC + lengths + header + nodes.tobytes() + params.tobytes()
    return body + struct.pack("<I", zlib.crc32(body))


def decode_plan(data: bytes) -> LaunchPlan:
    """The plan in `data`, or DamagedArtifact saying what is wrong with it (the caller adds
    artifact and file)."""
    start = len(MAGIC) + _LENGTHS.size
    if len(data) < start + 4 or data[: len(MAGIC)] != MAGIC:
        raise DamagedArtifact(
            f"not a launch plan: expected the magic {MAGIC!r}, found {data[: len(MAGIC)]!r}"
        )
    header_bytes, node_count, param_count = _LENGTHS.unpack_from(data, len(MAGIC))
    expected = start + header_bytes + node_count * NODE.itemsize + param_count * PARAM.itemsize + 4
    if len(data) != expected:
        raise DamagedArtifact(
            f"size of the launch plan: expected {expected} bytes by its tables, found {len(data)}"
        )
    (crc,) = struct.unpack_from("<I", data, len(data) - 4)
    if zlib.crc32(data[:-4]) != crc:
        raise DamagedArtifact(
            f"checksum of the launch plan: expected {crc:08x}, found {zlib.crc32(data[:-4]):08x}"
        )
    try:
        header = msgspec.msgpack.decode(data[start : start + header_bytes], type=PlanHeader)
    except msgspec.DecodeError as error:
        raise DamagedArtifact(f"header of the launch plan: {error}") from error
    nodes = np.frombuffer(data, NODE, node_count, start + header_bytes)
    params = np.frombuffer(
        data, PARAM, param_count, start + header_bytes + node_count * NODE.itemsize
    )
    plan = LaunchPlan(header=header, nodes=nodes, params=params)
    _check_tables(plan)
    return plan


def _check_tables(plan: LaunchPlan) -> None:
    """Every index points into its table, every io field lies inside the io block."""
    header, nodes, params = plan.header, plan.nodes, plan.params

    def need(ok: bool, what: str, expected: object, found: object) -> None:
        if not ok:
            raise DamagedArtifact(f"{what} of the launch plan: expected {expected}, found {found}")

    need(len(header.labels) == len(nodes), "labels", len(nodes), len(header.labels))
    ends = nodes["first_param"].astype(np.int64) + nodes["params"]
    if len(nodes):
        need(
            int(ends.max()) <= len(params),
            "parameter index",
            f"at most {len(params)}",
            int(ends.max()),
        )
        kernel = int(nodes["kernel"].max())
        need(kernel < len(header.kernels), "kernel index", f"below {len(header.kernels)}", kernel)
    if len(params):
        need(
            int(params["kind"].max()) <= PARAM_TENSORMAP,
            "parameter kind",
            f"at most {PARAM_TENSORMAP}",
            int(params["kind"].max()),
        )
        address, late = (
            params[params["kind"] == PARAM_ADDRESS],
            params[params["kind"] == PARAM_LATE],
        )
        need(
            bool((address["arena"] < len(ARENAS)).all()),
            "arena",
            f"below {len(ARENAS)}",
            sorted(set(address["arena"].tolist())),
        )
        need(
            bool((late["aux"] < len(header.late)).all()),
            "late value",
            f"below {len(header.late)}",
            sorted(set(late["aux"].tolist())),
        )
    maps = params[params["kind"] == PARAM_TENSORMAP]
    need(
        bool((maps["aux"] < len(header.tensormaps)).all()),
        "tensor map",
        f"below {len(header.tensormaps)}",
        sorted(set(maps["aux"].tolist())),
    )
    for map in header.tensormaps:
        axes = len(map.shape)
        need(
            0 <= map.arena < len(ARENAS)
            and map.offset >= 0
            and 1 <= axes <= 5
            and len(map.strides) == len(map.box) == axes
            and all(n > 0 for n in (*map.shape, *map.strides, *map.box, map.element_size)),
            "tensor map",
            "an arena, an offset and 1 to 5 positive axes",
            map,
        )
    need(
        0 <= header.upload_bytes <= header.io_bytes,
        "upload size",
        f"at most {header.io_bytes}",
        header.upload_bytes,
    )
    for io in header.io:
        need(
            io.dtype in IO_ITEMSIZE and all(d >= 0 for d in io.shape),
            f"io field {io.name}",
            "a known dtype and shape",
            f"{io.dtype}{list(io.shape)}",
        )
        end = io.offset + IO_ITEMSIZE[io.dtype] * int(np.prod(io.shape, dtype=object))
        low, high = (
            (header.upload_bytes, header.io_bytes) if io.output else (0, header.upload_bytes)
        )
        need(
            low <= io.offset and end <= high,
            f"io field {io.name}",
            f"inside [{low}, {high})",
            f"[{io.offset}, {end})",
        )
