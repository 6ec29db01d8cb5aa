"""The artifact: the directory a compile writes and a runtime maps. This module owns the format; the compiler imports it.

Layout, publish protocol, levels of checking and error texts: docs/artifact.md.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

SCHEMA = 1
ARENAS = ("weights", "state", "work", "io")


class IoField(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One array of a bucket's io block: `offset` in bytes from the start of the io arena, `shape` at the bucket's sizes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    output: bool = False


class KernelRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`file` is a manifest path under code/ (on CPU `cpu`: the library chosen at load); `entry` the symbol in it."""

    file: str
    entry: str
    name: str


class Bucket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes one plan serves: at most `tokens` flat tokens, `seqs` sequences and logit rows, `pages` page-table columns."""

    name: str
    tokens: int
    seqs: int
    pages: int


class PlanHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    bucket: Bucket
    io: tuple[IoField, ...]
    upload_bytes: int  # inputs are io[0:upload_bytes]; outputs follow
    io_bytes: int
    kernels: tuple[KernelRef, ...]
    labels: tuple[str, ...]  # one per node: what it computes, for reports and errors
    late: tuple[str, ...] = ()  # names of values known at load


# Plan tables. A parameter is Bytes (value is the 8 little-endian bytes), Address (arena, value = offset) or Late (aux = index
# into PlanHeader.late); TensorMap (aux = table index) is CUDA's.
PARAM_BYTES, PARAM_ADDRESS, PARAM_LATE, PARAM_TENSORMAP = 0, 1, 2, 3
PARAM = np.dtype([("kind", "<u1"), ("arena", "<u1"), ("size", "<u2"), ("aux", "<u4"), ("value", "<u8")])
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


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`role`: weights | binary | data."""

    path: str
    size: int
    sha256: str
    role: str


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stored field in weights/rank<r>.safetensors; `offset` in the weights arena equals its offset in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    crc32c: int


class StateLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """State arena: token state first (`slots` rows of last_token, counts, bias at fixed offsets), then the KV pages from
    `pages_offset`, page-major: page p starts at pages_offset + p * page_bytes and holds every layer. Only the number of
    pages is chosen at load."""

    slots: int
    page_size: int
    page_bytes: int
    pages_offset: int
    kv_dtype: str


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kind`: cpu | cuda. CPU: `machine` (x86_64, aarch64) and the ISA levels whose libraries are packed, best last."""

    kind: str
    machine: str
    levels: tuple[str, ...]
    abi: int


class CpuLibrary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One native library: `requires` are the /proc/cpuinfo feature names it needs, most demanding library last."""

    level: str
    path: str
    requires: tuple[str, ...]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the runtime says and needs of the model."""

    name: str
    family: str
    architectures: tuple[str, ...]
    context: int
    vocab: int
    dim: int
    layers: int
    parameters: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


class Golden(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Greedy tokens recorded at compile time on the compiling machine, for `verify`."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: int
    tool: str  # "headstart <version>"
    versions: dict[str, str]  # torch, compiler, … of the compile
    name: str
    model: ModelInfo
    target: Target
    dtype: str
    quant: dict[str, Any]
    kv_dtype: str
    ranks: int
    config: dict[str, Any]  # resolved CompileConfig
    provenance: dict[str, str]  # config key -> where its value came from
    spec: dict[str, Any]
    source: dict[str, str]  # checkpoint file -> sha256 (empty for random weights)
    buckets: tuple[Bucket, ...]
    work_bytes: int
    io_bytes: int
    weights_bytes: int
    edits: int
    max_seqs: int
    max_tokens: int
    state: StateLayout
    libraries: tuple[CpuLibrary, ...]
    files: tuple[FileEntry, ...]
    tensors: tuple[tuple[TensorEntry, ...], ...]  # per rank, load order
    report: dict[str, Any]  # launches, bytes, flops per bucket; fit
    accuracy: dict[str, float]
    golden: tuple[Golden, ...] = ()
