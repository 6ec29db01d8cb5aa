"""Registration of the CUDA kernel of sampling: five launches, the second and the last two for rows
with top-k, top-p or min-p only (code/sample_scan.py). Imported by kernels/cuda/register.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kernels.cuda.kernel import SIZES, Config, CudaKernel, launch, pointer, register
from kernels.cuda.kernel import workspace as scratch
from kernels.cuda.rows import PROCESSORS, power
from kernels.kernel import CallShape
from kernels.launch import Launch, Pointer

# Constants of code/sampling.py.
TOP_TILE, WORDS, REALS = 32, 8, 4
BINS = 2048
ROOM = 8192  # candidates of a row
MOST_SPLITS = 256

ROW_INPUTS = (
    *("row_token", "row_slot", "row_target", "row_flags", "row_top", "row_mask", "masks"),
    *("top_k", "temperature"),
    *("top_p", "min_p", "frequency", "presence", "repetition", "seed"),
)
STATE = {"counts": "counts", "bias": "bias", "last": "last_token"}
OUTPUTS = {
    "token": "token",
    "logprob": "logprob",
    "top_ids": "top_ids",
    "top_logprobs": "top_logprobs",
    "status": "status",
}


def _names(text: str) -> frozenset[str]:
    """Parameters: pointers in small letters, without their ending."""
    return frozenset(name if name.isupper() else f"{name}_ptr" for name in text.split())


_ROW = """live logits row_slot row_flags row_mask masks counts bias frequency presence repetition
    temperature min_p words reals VOCAB COLUMNS STATE MASK CHUNK SPLITS BINS"""
_PARTS = "row_target row_top top_k top_p best best_id raw_max raw_sum bad weight top bins"
_TOKEN = "row_token seed positions last token logprob top_k top_p SPLIT_TILE ROOM TILE"
_OTHERS = frozenset({"words_ptr", "bins_ptr", "reals_ptr", "BINS"})
SCAN = _names(f"{_ROW} {_PARTS}") - _OTHERS
COUNT = _names(f"{_ROW} row_target top_k top_p bins") - {"words_ptr"}
JOIN = _names(f"{_ROW} {_PARTS} {_TOKEN} top_ids top_logprobs status")
COLLECT = _names(f"{_ROW} masses candidates ROOM")
DRAW = _names(f"{_ROW} {_TOKEN} masses candidates")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig(Config):
    """`chunk`: vocabulary of a program; `tile`: candidates looked at together; `warps` of both."""

    chunk: int
    tile: int
    warps: int


def _rows(call: CallShape) -> int:
    return call.shapes["logits"][0]


def _splits(call: CallShape, config: SampleConfig) -> int:
    return -(-call.attrs["vocab"] // config.chunk)


def _accepts(call: CallShape) -> str | None:
    vocab = call.attrs["vocab"]
    if vocab > MOST_SPLITS * 8192:
        return f"a vocabulary of {vocab} is more than {MOST_SPLITS * 8192}"
    if call.dtypes["logits"] != "float32":
        return f"logits are {call.dtypes['logits']}: supported is float32"
    return None


def _valid(call: CallShape, config: SampleConfig) -> str | None:
    splits = _splits(call, config)
    if splits > MOST_SPLITS:
        return f"{splits} chunks of {config.chunk} are more than {MOST_SPLITS}"
    each = config.chunk // (32 * config.warps)
    return f"{each} values per thread" if each > 32 else None


def _default(call: CallShape) -> SampleConfig:
    """8 logits per thread: registers for two programs on a processor."""
    vocab = call.attrs["vocab"]
    chunk = 2048
    while chunk > 1024 and chunk // 2 >= vocab:
        chunk //= 2
    while vocab > MOST_SPLITS * chunk:
        chunk *= 2
    return SampleConfig(chunk=chunk, tile=512, warps=8)


def _segments(call: CallShape, config: SampleConfig) -> dict[str, tuple[str, int]]:
    """Type and number of elements of every part of the workspace."""
    rows, splits = _rows(call), _splits(call, config)
    parts = rows * splits
    return {
        "best": ("fp32", parts),
        "best_id": ("i32", parts),
        "raw_max": ("fp32", parts),
        "raw_sum": ("fp32", parts),
        "bad": ("i32", parts),
        "weight": ("i64", parts),
        "top": ("i64", parts * TOP_TILE),
        "bins": ("i16", parts * BINS),
        "words": ("i32", rows * WORDS),
        "reals": ("fp32", rows * REALS),
        "masses": ("i64", parts * 4),
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
    named = {name: name for name in ("live", "logits", *ROW_INPUTS, "positions")}
    slots = {f"{n}_ptr": pointer(call, arg) for n, arg in {**named, **STATE, **OUTPUTS}.items()}
    sizes: dict[str, Any] = {
        "VOCAB": call.attrs["vocab"],
        "COLUMNS": columns,
        "STATE": call.shapes["counts"][1],
        "MASK": call.shapes["masks"][1],
        "CHUNK": config.chunk,
        "SPLITS": splits,
        "SPLIT_TILE": power(splits),
        "BINS": BINS,
        "ROOM": ROOM,
        "TILE": min(config.tile, config.chunk),
    }
    everything = {**slots, **places, **sizes}

    def one(function: str, grid: tuple[int, int, int], names: frozenset[str]) -> Launch:
        given = {name: value for name, value in everything.items() if name in names}
        return launch(function, grid, warps=config.warps, stages=3, **given)

    fixed = (min(rows * splits, 4 * PROCESSORS), 1, 1)
    return (
        one("sample_scan.scan_kernel", (splits, rows, 1), SCAN),
        one("sample_count.count_kernel", fixed, COUNT),
        one("sample_join.join_kernel", (rows, 1, 1), JOIN),
        one("sample_collect.collect_kernel", fixed, COLLECT),
        one("sample_draw.draw_kernel", (rows, 1, 1), DRAW),
    )


register(
    CudaKernel(
        name="sample",
        op="sample",
        accepts=_accepts,
        space=lambda call: [
            SampleConfig(chunk=c, tile=t, warps=w)
            for c in (1024, 2048, 4096, 8192)
            for t in (512, 1024, 2048)
            for w in (4, 8, 16)
        ],
        valid=_valid,
        default=_default,
        launches=_launches,
        workspace=lambda call, config: _place(call, config)[1],
    )
)
