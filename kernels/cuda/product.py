"""What the CUDA kernels that multiply rows by a stored weight share: how a weight is read, the
configurations and what they may be, their splits, arguments and workspace (code/product.py is the
device's part)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kernels.cuda.kernel import SIZES, Config, counters, pointer, stored, workspace
from kernels.cuda.layout import BITS, parse_format
from kernels.cuda.rows import PROCESSORS, cdiv
from kernels.kernel import CallShape
from kernels.launch import COUNTERS_BYTES, Descriptor, Slot

SHARED = 227 << 10  # bytes of shared memory a program may have
GATED = ("swiglu", "geglu", "geglu_tanh", "swiglu_clamped")
# Epilogues hold float32 accumulators: this many per thread leave room for the rest.
ACCUMULATORS = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """How a stored weight is read: `type` of its elements in Triton's spelling, `per` inputs of an
    element, `bits` and `group` of integer codes (0: floats), `row_scale` of fp8."""

    type: str
    per: int
    bits: int
    group: int
    row_scale: bool

    @property
    def row_bytes(self) -> float:
        """Bytes per input."""
        return SIZES[self.type] / self.per


def weight_of(call: CallShape, arg: str = "w") -> Weight:
    kind, group = parse_format(call.formats[arg])
    bits = BITS.get(kind, 0)
    type = {"float32": "fp32", "bfloat16": "bf16", "fp8": "fp8e4nv"}.get(kind, "i32")
    return Weight(
        type=type,
        per=32 // bits if bits else 1,
        bits=bits,
        group=group,
        row_scale=kind == "fp8",
    )


def half(call: CallShape) -> bool:
    """Whether products are of bfloat16 numbers. Weights kept in float32 are kept for their
    precision (routers), so they are not rounded."""
    return call.dtypes["x"] == "bfloat16" and call.formats["w"] != "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorConfig(Config):
    block_n: int
    block_k: int
    split: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig(Config):
    """`programs` 0: one per tile and split. `rows_first`: norm and row choice as a first launch.
    `x_left`: activations, not weights, are the left operand, which may come from registers.
    `tma`: weights and, where they need no pointers, activations by tensor map."""

    block_n: int
    block_m: int
    block_k: int
    split: int = 1
    warps: int = 4
    stages: int = 3
    tma: bool = True
    programs: int = 0
    rows_first: bool = False
    x_left: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    rows: int
    outputs: int
    k: int
    gated: bool


def sizes(call: CallShape) -> Sizes:
    rows, outputs = call.shapes["out"]
    return Sizes(
        rows=rows,
        outputs=outputs,
        k=call.shapes["w"][1],
        gated=call.attrs.get("act", "") in GATED,
    )


def tile_count(s: Sizes, block_n: int, block_m: int) -> int:
    """Tiles of the output, [block_n, block_m] each."""
    return cdiv(s.outputs, block_n) * cdiv(s.rows, block_m)


def split_for(tiles: int, steps: int, wanted: int, least_steps: int) -> int:
    """Parts of the inputs so that `tiles` of them fill `wanted` programs, each with `least_steps`
    steps or more."""
    best = 1
    while best < 16 and tiles * best * 2 <= wanted and steps // (best * 2) >= least_steps:
        best *= 2
    return best


def splits_to_try(tiles: int) -> list[int]:
    """Parts of the inputs worth measuring where a processor holds one program: powers of two, and
    where those leave more than a tenth of the processors idle the smallest that does not. It is no
    choice of the heuristic: whether more partial sums through L2 cost less is not known."""

    def busy(split: int) -> float:
        return tiles * split / (cdiv(tiles * split, PROCESSORS) * PROCESSORS)

    plain = [1, 2, 4]
    if max(map(busy, plain)) >= 0.9:
        return plain
    return [*plain, *[split for split in range(3, 9) if busy(split) >= 0.9][:1]]


def product_arguments(call: CallShape, config: Any, s: Sizes, w: Weight) -> dict[str, Any]:
    """Arguments of every kernel that multiplies rows by the call's weight."""
    attrs = call.attrs
    split = config.split > 1
    scaled = w.bits or w.row_scale
    return {
        "scale_ptr": stored("w", "scale", "fp16" if w.bits else "fp32") if scaled else None,
        "bias_ptr": pointer(call, "bias"),
        "part_ptr": workspace("fp32") if split else None,
        "counter_ptr": counters() if split else None,
        "LIVE": attrs.get("live_index", 0),
        "OUTPUTS": s.outputs,
        "K": s.k,
        "ROW_BYTES": int(s.k * w.row_bytes),
        "EPS": float(attrs.get("eps", 0.0)) if "norm" in call.shapes else 0.0,
        "BITS": w.bits,
        "GROUP": w.group,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT": config.split,
        "STAGES": config.stages,
    }


def refuse_counters(tiles: int) -> str | None:
    """Why the tiles of a split product cannot be counted, or None."""
    if tiles * 4 > COUNTERS_BYTES:
        return f"{tiles} tiles need more than {COUNTERS_BYTES // 4} counters"
    return None


def part_bytes(units: int, config: Any, block_m: int, gated: bool) -> int:
    """Bytes of the partial sums of every unit (a split of a tile), as `reduce` of
    code/linear_ends.py lays them out: with the sums of squares of its rows."""
    each = config.block_n * block_m * (2 if gated else 1) + block_m
    return units * each * 4 if config.split > 1 else 0


def fetches_ahead(k: int, w: Weight, block_k: int) -> bool:
    """Whether the first weights are fetched before the previous kernel ends: whole steps of whole
    32-byte sectors, a power of two of them."""
    step = int(block_k * w.row_bytes)
    return k % block_k == 0 and step >= 32 and int(k * w.row_bytes) % 32 == 0


def logits(call: CallShape) -> bool:
    """The head's results alone are kept more precisely than its inputs."""
    return call.dtypes["out"] == "float32" and half(call)


def resplit(config: TileConfig, tiles: int, steps: int, wanted: int, least: int) -> TileConfig:
    return replace(config, split=split_for(tiles, steps, wanted, least))


def tile_reason(
    config: TileConfig, w: Weight, *, outputs: int, k: int, gated: bool, half: bool
) -> str | None:
    """Why a tile configuration cannot be used, whatever the op around it."""
    each = 2 if gated else 1
    if w.group and (config.block_k % w.group or k % w.group):
        return f"block_k {config.block_k} is not a multiple of the group {w.group}"
    if config.block_k // w.per < 16:
        return f"block_k {config.block_k} is {config.block_k // w.per} words, 16 at least"
    if w.bits and not half and config.tma:
        return "codes times float32 activations are read by pointers"
    row_bytes = int(k * w.row_bytes)
    if config.tma and row_bytes % 16:
        return f"rows of {row_bytes} bytes cannot be described to TMA, multiples of 16 can"
    if config.split > cdiv(k, config.block_k):
        return f"split {config.split} of {cdiv(k, config.block_k)} steps"
    held = each * config.block_n * config.block_m // (32 * config.warps)
    if held > ACCUMULATORS:
        return f"{held} accumulators per thread, {ACCUMULATORS} at most"
    return refuse_shared(config.stages * step_bytes(config, w, gated=gated, half=half))


def step_bytes(config: TileConfig, w: Weight, *, gated: bool, half: bool) -> int:
    """Shared memory that a step of the product takes while it is under way."""
    x_bytes = (2 if half else 4) * config.block_m * config.block_k
    return (2 if gated else 1) * int(config.block_n * config.block_k * w.row_bytes) + x_bytes


def refuse_shared(size: int) -> str | None:
    """Barriers and reductions take some of it, too."""
    if size > SHARED - 2048:
        return f"{size} bytes of shared memory, {SHARED - 2048} at most"
    return None


def weight_slot(arg: str, w: Weight, rows: int, k: int, config: TileConfig) -> Slot:
    """The stored rows as a pointer or a tensor map."""
    if not config.tma:
        return stored(arg, "data", w.type)
    return Descriptor(
        arg=arg,
        field="data",
        type=w.type,
        shape=(rows, k // w.per),
        strides=(k // w.per, 1),
        block=(config.block_n, config.block_k // w.per),
    )
