"""The manifest: everything a runtime must know of an artifact before it opens another file of it.

Comes in: the bytes of manifest.json. Goes out: a Manifest, and back. Its canonical JSON (sorted
keys, no spaces) is hashed into the artifact's name, so there is exactly one encoding. Types are
re-exported by `runtime.artifact`.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from typing import Any, Literal

import msgspec

from runtime.errors import DamagedArtifact, IncompatibleTarget
from runtime.plan import Bucket

SCHEMA = 1
TOOL = "headstart 0.1.0"  # as in pyproject.toml (a test compares)


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`role`: weights | binary | data."""

    path: str
    size: int
    sha256: str
    role: str


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stored field in weights/rank<r>.safetensors; `offset` in the weights arena equals its
    offset in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    crc32c: int


class StateLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """State arena: token state first (`slots` rows of last_token, counts, bias at fixed
    offsets), then the KV pages from `pages_offset`, page-major: page p starts at pages_offset +
    p * page_bytes and holds every layer. Only the number of pages is chosen at load."""

    slots: int
    page_size: int
    page_bytes: int
    pages_offset: int
    kv_dtype: str


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kind`: cpu | cuda. CPU: `machine` (x86_64, aarch64) and the ISA levels whose libraries
    are packed, best last. CUDA: `machine` is the architecture (sm_90a), `levels` the GPU the
    kernels were chosen for."""

    kind: str
    machine: str
    levels: tuple[str, ...]
    abi: int


class CpuLibrary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One native library: `requires` are the /proc/cpuinfo feature names it needs, most
    demanding library last."""

    level: str
    path: str
    requires: tuple[str, ...]


class KernelParameter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kind`: pointer | number | tensormap | shape | stride | null; `offset` and `size` in bytes,
    as read from the binary."""

    kind: str
    offset: int
    size: int


class CudaBinary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One cubin (`path`, in Manifest.files) and what loading it takes. `block`: threads;
    `cluster`: thread blocks of a cluster (grid x counts clusters' blocks already); `shared`:
    dynamic shared memory in bytes; `stack`: bytes per thread; `elf_abi` 7 loads on drivers of CUDA
    12 and newer, 8 on 13 and newer."""

    path: str
    entry: str
    block: int
    cluster: int
    shared: int
    registers: int
    stack: int
    elf_abi: int
    parameters: tuple[KernelParameter, ...]


class LengthRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which row of rope frequencies a token takes (io `rope_variant`), where that depends on a
    length n. `of`: prompt (n is the prompt's length), sequence (the whole sequence's: when the row
    changes, everything before is computed again) or token (the larger of the prompt's length and
    the token's position + 1). The row is the number of `bounds` below n; for tokens, n minus the
    one bound, at least 0."""

    of: Literal["prompt", "sequence", "token"]
    bounds: tuple[int, ...]

    def row(self, n: int) -> int:
        if self.of == "token":
            return max(n - self.bounds[0], 0)
        return bisect_left(self.bounds, n)

    def last(self, n: int) -> int | None:
        """The longest sequence with the row of one of n tokens, where a longer one has another and
        takes all its tokens along."""
        beyond = [bound for bound in self.bounds if bound >= n]
        return beyond[0] if self.of == "sequence" and beyond else None


class EmbeddingInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a model that gives one vector of `dim` numbers per sequence. `pooling`: last | cls | mean;
    `normalise`: vectors have length 1; `whole`: a sequence is computed in one step; `dimensions`:
    lengths its vectors may be cut to."""

    dim: int
    pooling: str
    normalise: bool
    whole: bool
    dimensions: tuple[int, ...] = ()


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
    rope_rule: LengthRule | None = None
    embedding: EmbeddingInfo | None = None


class Golden(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Greedy tokens of a prompt, or the vector an embedding model gives it, recorded at compile
    time on the compiling machine, for `verify`."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    vector: tuple[float, ...] = ()


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
    widened: tuple[str, ...] = ()  # weights of bfloat16 numbers, stored so and widened to float32
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
    kernels: tuple[CudaBinary, ...] = ()
    counters_bytes: int = 0  # at the start of the work arena: zero when a session opens (CUDA)
    files: tuple[FileEntry, ...]
    tensors: tuple[tuple[TensorEntry, ...], ...]  # per rank, load order
    report: dict[str, Any]  # launches, bytes, flops per bucket; fit
    accuracy: dict[str, float]
    golden: tuple[Golden, ...] = ()


class _Version(msgspec.Struct, frozen=True):
    schema: int


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.encode(manifest, order="sorted")


def decode_manifest(data: bytes) -> Manifest:
    """The manifest, or an error without artifact and file (the caller adds them)."""
    try:
        version = msgspec.json.decode(data, type=_Version).schema
        if version != SCHEMA:
            raise IncompatibleTarget(
                f"schema: expected {SCHEMA}, found {version}; compile it again with this version"
            )
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedArtifact(f"manifest: {error}") from error


def digest(manifest_bytes: bytes) -> str:
    return hashlib.sha256(manifest_bytes).hexdigest()


def weights_path(rank: int) -> str:
    return f"weights/rank{rank}.safetensors"


def plan_path(rank: int, bucket: str) -> str:
    return f"plans/rank{rank}.{bucket}.plan"
