"""Registration of the CUDA kernel of sampling: two launches, the second for rows with top-k, top-p
or min-p only (code/sample_scan.py). Imported by kernels/cuda/register.py.

Each launch ends with the work of one program per row, which has other registers than the reading of
the logits: together they would take 180 to 190. With up to 8 logits per thread the limit of 128
costs no spill, so two programs of 8 warps share a processor. That is enough for the memory: while
one chunk is in registers, the next two of each are on their way through shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kernels.cuda.kernel import SIZES, Config, CudaKernel, counters, launch, pointer, register
from kernels.cuda.kernel import workspace as scratch
from kernels.cuda.rows import PROCESSORS, cdiv
from kernels.kernel import CallShape
from kernels.launch import COUNTERS_BYTES, Launch, Pointer

# Constants of code/sampling.py.
TOP_TILE, WORDS, REALS = 32, 8, 4
BINS = 256
ROOM = 8192  # candidates of a row
MOST_SPLITS = 256

ROW_INPUTS = (
    *("row_token", "row_slot", "row_target", "row_flags", "row_top", "row_mask", "masks"),
    *("top_k", "temperature"),
    *("top_p", "min_p", "frequency", "presence", "repetition", "seed"),
)
STATE = {"counts": "counts", "bias": "bias", "last": "last_token"}
OUTPUTS = ("token", "logprob", "top_ids", "top_logprobs", "status")


def _names(text: str) -> frozenset[str]:
    """Parameters: pointers in small letters, without their ending."""
    return frozenset(name if name.isupper() else f"{name}_ptr" for name in text.split())


_BOTH = """live logits row_token row_slot row_flags row_mask masks top_k temperature top_p min_p
    frequency presence repetition seed positions counts bias last token logprob words reals counter
    VOCAB COLUMNS STATE MASK CHUNK SPLITS STEPS STAGES PROGRAMS BINS ROOM TILE"""
_PARTS = "best best_id raw_max raw_sum bad chunk_best weight top bins mass"
SCAN = _names(f"{_BOTH} row_target row_top top_ids top_logprobs status {_PARTS}")
COLLECT = _names(f"{_BOTH} masses sure candidates")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig(Config):
    """`chunk`: logits in registers at a time; `steps`: chunks that a program reads one after the
    other; `tile`: candidates looked at together."""

    chunk: int
    steps: int
    tile: int
    warps: int


def _rows(call: CallShape) -> int:
    return call.shapes["logits"][0]


def _splits(call: CallShape, config: SampleConfig) -> int:
    return cdiv(call.attrs["vocab"], config.chunk)


def _programs(call: CallShape, config: SampleConfig) -> int:
    """Of one row, in either launch."""
    return cdiv(_splits(call, config), config.steps)


def _accepts(call: CallShape) -> str | None:
    vocab = call.attrs["vocab"]
    if vocab > MOST_SPLITS * 8192:
        return f"a vocabulary of {vocab} is more than {MOST_SPLITS * 8192}"
    if _rows(call) > COUNTERS_BYTES // 4:
        return f"{_rows(call)} rows need more than {COUNTERS_BYTES // 4} counters"
    if call.dtypes["logits"] != "float32":
        return f"logits are {call.dtypes['logits']}: supported is float32"
    return None


def _valid(call: CallShape, config: SampleConfig) -> str | None:
    splits = _splits(call, config)
    if splits > MOST_SPLITS:
        return f"{splits} chunks of {config.chunk} are more than {MOST_SPLITS}"
    each = config.chunk // (32 * config.warps)
    if not 4 <= each <= 16:
        return f"{config.chunk} logits on {config.warps} warps are {each} a thread: 4 to 16 fit"
    return None


def _default(call: CallShape) -> SampleConfig:
    """8 logits per thread. Few rows are spread over all processors; many rows take programs of
    several chunks, whose histogram and last steps are then fewer, while every processor has seven
    programs."""
    vocab = call.attrs["vocab"]
    chunk = 2048
    while chunk > 1024 and chunk // 2 >= vocab:
        chunk //= 2
    while vocab > MOST_SPLITS * chunk:
        chunk *= 2
    steps = 1
    while steps < 16 and _rows(call) * cdiv(vocab, 2 * steps * chunk) >= 7 * PROCESSORS:
        steps *= 2
    return SampleConfig(chunk=chunk, steps=steps, tile=512, warps=max(8, chunk // 512))


def _segments(call: CallShape, config: SampleConfig) -> dict[str, tuple[str, int]]:
    """Type and number of elements of every part of the workspace."""
    rows, splits = _rows(call), _splits(call, config)
    parts, chunks = rows * _programs(call, config), rows * splits
    return {
        "best": ("fp32", parts),
        "best_id": ("i32", parts),
        "raw_max": ("fp32", parts),
        "raw_sum": ("fp32", parts),
        "bad": ("i32", parts),
        "chunk_best": ("fp32", chunks),
        "weight": ("i64", chunks),
        "top": ("i64", chunks * TOP_TILE),
        "bins": ("i32", parts * BINS),
        "mass": ("fp32", parts),
        "words": ("i32", rows * WORDS),
        "reals": ("fp32", rows * REALS),
        "masses": ("i64", parts * 2),
        "sure": ("i64", chunks),
        "candidates": ("i64", rows * ROOM),
    }


def _place(call: CallShape, config: SampleConfig) -> tuple[dict[str, Pointer], int]:
    """Where each part of the workspace is, and the size of all."""
    at = 0
    pointers = {}
    for name, (type, count) in _segments(call, config).items():
        pointers[f"{name}_ptr"] = scratch(type, at)
        at += math.ceil(count * SIZES[type] / 256) * 256
    return pointers, at


def _launches(call: CallShape, config: SampleConfig) -> tuple[Launch, ...]:
    rows, columns = call.shapes["logits"]
    splits = _splits(call, config)
    places, _ = _place(call, config)
    names = ("live", "logits", *ROW_INPUTS, "positions", *STATE, *OUTPUTS)
    slots = {f"{name}_ptr": pointer(call, STATE.get(name, name)) for name in names}
    sizes: dict[str, Any] = {
        "VOCAB": call.attrs["vocab"],
        "COLUMNS": columns,
        "STATE": call.shapes["counts"][1],
        "MASK": call.shapes["masks"][1],
        "CHUNK": config.chunk,
        "SPLITS": splits,
        "STEPS": config.steps,
        "STAGES": min(config.steps, 3),
        "PROGRAMS": _programs(call, config),
        "BINS": BINS,
        "ROOM": ROOM,
        "TILE": min(config.tile, config.chunk),
    }
    everything = {**slots, **places, **sizes, "counter_ptr": counters()}

    def one(function: str, names: frozenset[str]) -> Launch:
        given = {name: value for name, value in everything.items() if name in names}
        grid = (sizes["PROGRAMS"], rows, 1)
        limit = 128 if config.chunk <= 256 * config.warps else 0
        return launch(function, grid, warps=config.warps, registers=limit, **given)

    return (
        one("sample_scan.scan_kernel", SCAN),
        one("sample_collect.collect_kernel", COLLECT),
    )


register(
    CudaKernel(
        name="sample",
        op="sample",
        accepts=_accepts,
        space=lambda call: [
            SampleConfig(chunk=c, steps=s, tile=t, warps=w)
            for c in (1024, 2048, 4096)
            for s in (1, 2, 4, 8, 16)
            for t in (512, 1024)
            for w in (4, 8, 16)
        ],
        valid=_valid,
        default=_default,
        launches=_launches,
        workspace=lambda call, config: _place(call, config)[1],
    )
)
