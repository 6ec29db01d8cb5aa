"""A small artifact for a GPU with made-up cubins: two kernels, four buckets, every kind of
parameter. What the stub driver must be told about the cubins comes from the same tables.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import google_crc32c
import numpy as np
from cuda_stub import Stub

from runtime import weights_file
from runtime.artifact import (
    ARENAS,
    FLAG_PROGRAMMATIC,
    MANIFEST,
    NODE,
    PARAM,
    PARAM_ADDRESS,
    PARAM_BYTES,
    PARAM_TENSORMAP,
    SCHEMA,
    TOOL,
    Artifact,
    Bucket,
    CudaBinary,
    FileEntry,
    IoField,
    KernelParameter,
    KernelRef,
    LaunchPlan,
    Manifest,
    ModelInfo,
    PlanHeader,
    StateLayout,
    Target,
    TensorEntry,
    TensorMap,
    digest,
    encode_manifest,
    encode_plan,
    plan_path,
    weights_path,
)
from runtime.device.staging import ROW_FIELDS

VOCAB, SLOTS, EDITS, TOP = 100, 4, 8, 20
FLOATS = ("temperature", "top_p", "min_p", "frequency", "presence", "repetition")
BUCKETS = (
    Bucket(name="d1", tokens=1, seqs=1, pages=4, kind="decode"),
    Bucket(name="d4", tokens=4, seqs=4, pages=4, kind="decode"),
    Bucket(name="m8", tokens=8, seqs=4, pages=4),
    Bucket(name="m16", tokens=16, seqs=4, pages=4),
)
# (kind, offset, size) as ptxas lays them out: a tensor map begins at 48
ECHO = (("pointer", 0, 8), ("pointer", 8, 8), ("pointer", 16, 8), ("number", 24, 4))
ECHO = (*ECHO, ("null", 32, 8), ("null", 40, 8))
TILE = (
    *(("tensormap", 48, 128), ("shape", 176, 4), ("shape", 180, 4)),
    *(("stride", 184, 8), ("stride", 192, 8), ("pointer", 200, 8), ("pointer", 208, 8)),
)
IMAGES = {"code/echo.cubin": b"\x7fELF echo", "code/tile.cubin": b"\x7fELF tile"}


def parameters(rows: tuple[tuple[str, int, int], ...]) -> tuple[KernelParameter, ...]:
    return tuple(KernelParameter(kind=k, offset=o, size=s) for k, o, s in rows)


KERNELS = (
    CudaBinary(path="code/echo.cubin", entry="echo_kernel", block=128, cluster=1, shared=0,
               registers=32, stack=0, elf_abi=7, parameters=parameters(ECHO)),
    CudaBinary(path="code/tile.cubin", entry="tile_kernel", block=256, cluster=2, shared=100_000,
               registers=90, stack=0, elf_abi=7, parameters=parameters(TILE)),
)  # fmt: skip


def register(stub: Stub, kernels: tuple[CudaBinary, ...] = KERNELS) -> None:
    for kernel in kernels:
        table = [(p.offset, p.size) for p in kernel.parameters]
        stub.image(IMAGES[kernel.path], {kernel.entry: table})


def io_fields(bucket: Bucket) -> tuple[tuple[IoField, ...], int, int]:
    n, s = bucket.tokens, bucket.seqs
    inputs: list[tuple[str, str, tuple[int, ...]]] = [("masks", "int32", (s, -(-VOCAB // 32)))]
    inputs += [("live", "int32", (8,))]
    inputs += [(name, "int32", (n,)) for name in ("tokens", "positions", "kv_slots")]
    inputs += [("seq_start", "int32", (s + 1,)), ("seq_len", "int32", (s,))]
    inputs += [("pages", "int32", (s, bucket.pages))]
    for name in (*ROW_FIELDS, "row_mask"):
        dtype = "float32" if name in FLOATS else "int64" if name == "seed" else "int32"
        inputs.append((name, dtype, (s,)))
    inputs.append(("edits", "int32", (EDITS, 4)))
    outputs: list[tuple[str, str, tuple[int, ...]]] = [
        *(("token", "int32", (s,)), ("logprob", "float32", (s,)), ("status", "int32", (s,))),
        *(("top_ids", "int32", (s, TOP)), ("top_logprobs", "float32", (s, TOP))),
    ]
    fields, end, upload = [], 0, 0
    for name, dtype, shape in (*inputs, *outputs):
        output = (name, dtype, shape) in outputs
        if output and not upload:
            upload = end
        field = IoField(name=name, dtype=dtype, shape=shape, offset=end, output=output)
        fields.append(field)
        end += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64
    return tuple(fields), upload, end


def plan(bucket: Bucket) -> LaunchPlan:
    """echo(live, tokens, token, VOCAB), tile(map of weights, …, workspace), echo again; the last
    two may start early."""
    io, upload, end = io_fields(bucket)
    at = {field.name: field.offset for field in io}
    weights, work, io_arena = (ARENAS.index(name) for name in ("weights", "work", "io"))
    echo = [
        *((PARAM_ADDRESS, io_arena, 8, 0, at[name]) for name in ("live", "tokens", "token")),
        (PARAM_BYTES, 0, 4, 0, VOCAB),
        *[(PARAM_BYTES, 0, 8, 0, 0)] * 2,
    ]
    tile = [
        (PARAM_TENSORMAP, 0, 128, 0, 0),
        *((PARAM_BYTES, 0, size, 0, value) for size, value in ((4, 32), (4, 64), (8, 64), (8, 1))),
        (PARAM_ADDRESS, work, 8, 0, 512),
        (PARAM_BYTES, 0, 8, 0, 0),
    ]
    rows = [*echo, *tile, *echo]
    params = np.zeros(len(rows), PARAM)
    for index, row in enumerate(rows):
        for name, value in zip(("kind", "arena", "size", "aux", "value"), row, strict=True):
            params[index][name] = value
    nodes = np.zeros(3, NODE)
    nodes["kernel"] = (0, 1, 0)
    nodes["first_param"] = (0, len(echo), len(echo) + len(tile))
    nodes["params"] = (len(echo), len(tile), len(echo))
    nodes["grid"] = ((bucket.tokens, 1, 1), (4, 2, 1), (bucket.tokens, 1, 1))
    nodes["block"] = ((128, 1, 1), (256, 1, 1), (128, 1, 1))
    nodes["cluster"] = ((1, 1, 1), (2, 1, 1), (1, 1, 1))
    nodes["shared"] = (0, 100_000, 0)
    nodes["flags"] = (0, FLAG_PROGRAMMATIC, FLAG_PROGRAMMATIC)
    header = PlanHeader(
        bucket=bucket,
        io=io,
        upload_bytes=upload,
        io_bytes=end,
        kernels=tuple(KernelRef(file=k.path, entry=k.entry, name=k.entry) for k in KERNELS),
        labels=("echo", "tile", "echo"),
        tensormaps=(
            TensorMap(arena=weights, offset=256, element_type=9, element_size=2, shape=(32, 64),
                      strides=(64, 1), box=(16, 64), swizzle=3),
        ),
    )  # fmt: skip
    return LaunchPlan(header=header, nodes=nodes, params=params)


def weights() -> list[tuple[str, np.ndarray]]:
    """A matrix of several chunks that ends inside one, a norm, a small matrix."""
    rng = np.random.default_rng(0)
    large = rng.integers(0, 2**16, (2048, 5000), np.uint16)
    return [
        ("norm.data", rng.random(96, np.float32)),
        ("large.data", large),
        ("last.data", rng.integers(0, 2**16, (100, 64), np.uint16)),
    ]


def write(root: Path, **changes: object) -> Artifact:
    """An artifact in `root`; `changes` to its manifest."""
    tensors, data = [], b""
    for name, array in weights():
        raw = array.tobytes()
        dtype = "float32" if array.dtype == np.float32 else "bfloat16"
        tensors.append(
            TensorEntry(name=name, dtype=dtype, shape=array.shape, offset=len(data), size=len(raw),
                        crc32c=google_crc32c.value(raw))
        )  # fmt: skip
        data += raw
    files = {
        weights_path(0): ("weights", weights_file.header(tensors) + data),
        **{path: ("binary", image) for path, image in IMAGES.items()},
        **{plan_path(0, b.name): ("data", encode_plan(plan(b))) for b in BUCKETS},
    }
    entries = tuple(
        FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest(), role=role)
        for path, (role, data) in sorted(files.items())
    )
    fields: dict = {
        "schema": SCHEMA,
        "tool": TOOL,
        "versions": {},
        "name": "toy",
        "model": ModelInfo(name="toy", family="llama", architectures=(), context=64, vocab=VOCAB,
                           dim=8, layers=1, parameters=9, eos_token_ids=(), bos_token_id=None),
        "target": Target(kind="cuda", machine="sm_90a", levels=("h200",), abi=1),
        "dtype": "bfloat16",
        "quant": {},
        "kv_dtype": "bfloat16",
        "ranks": 1,
        "config": {},
        "provenance": {},
        "spec": {},
        "source": {},
        "buckets": BUCKETS,
        "work_bytes": 4096,
        "io_bytes": io_fields(BUCKETS[-1])[2],
        "weights_bytes": sum(t.size for t in tensors),
        "edits": EDITS,
        "max_seqs": SLOTS,
        "max_tokens": 16,
        "state": StateLayout(slots=SLOTS, page_size=16, page_bytes=4096, pages_offset=4096,
                             kv_dtype="bfloat16"),
        "libraries": (),
        "kernels": KERNELS,
        "counters_bytes": 512,
        "files": entries,
        "tensors": (tuple(tensors),),
        "report": {},
        "accuracy": {},
    } | changes  # fmt: skip
    manifest = encode_manifest(Manifest(**fields))
    path = root / f"toy-{digest(manifest)}"
    for name, (_, content) in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (path / MANIFEST).write_bytes(manifest)
    return Artifact.open(path)
