"""Registration of the CUDA kernel of `linear` on fp8 activations and fp8 weights (x_format "fp8").
Imported by kernels/cuda/register.py.

Codes of the rows are made in a first launch, which also normalises and chooses them; the product
then reads both operands by tensor map and multiplies them from shared memory, at twice the rate of
bfloat16. Up to FEW rows, where a launch would cost more than reading a row twice does, every
program makes the codes itself (`rows_first` False).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kernels.cuda.kernel import (
    TYPES,
    CudaKernel,
    counters,
    launch,
    pointer,
    register,
    stored,
    workspace,
)
from kernels.cuda.linear import (
    SHARED,
    Sizes,
    TileConfig,
    fetches_ahead,
    sizes,
    split_for,
    weight_of,
)
from kernels.cuda.rows import PROCESSORS, power, refuse_types
from kernels.kernel import CallShape
from kernels.launch import COUNTERS_BYTES, WORKSPACE, Descriptor, Launch, Pointer, Slot

FEW = 4  # rows of which every program makes the codes
STEP = 128  # inputs whose products the tensor cores may add by themselves
ROW_BLOCK = 16384  # numbers of a row that one program keeps in registers
ACCUMULATORS = 192  # per thread, the sums of a step among them
ALIGN = 256


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _up(size: int) -> int:
    return _ceil(size, ALIGN) * ALIGN


def refuse_formats(call: CallShape) -> str | None:
    """Why the call is no product of fp8 codes."""
    if call.attrs.get("x_format", "") != "fp8":
        return f"x is {call.attrs.get('x_format') or call.dtypes['x']}, not quantized to fp8"
    if call.formats["w"] != "fp8r":
        return f"w is {call.formats['w']}: fp8 activations multiply fp8r weights"
    return refuse_types(call, "x", "out", "residual")


def codes_bytes(s: Sizes) -> int:
    """Bytes of the rows' codes; their scales follow."""
    return _up(s.rows * s.k)


def scales_bytes(s: Sizes) -> int:
    return _up(s.rows * 4)


def scales_pointer(s: Sizes) -> Pointer:
    return workspace("fp32", codes_bytes(s))


def rows_launch(call: CallShape, s: Sizes) -> Launch:
    """Codes [R, K] and scales [R] of the call's rows, at the start of the workspace."""
    block = power(s.k) if s.k <= ROW_BLOCK else ROW_BLOCK // 2
    return launch(
        "linear_fp8.rows_kernel",
        (s.rows, 1, 1),
        warps=min(32, max(1, block // 512)),
        live_ptr=pointer(call, "live"),
        x_ptr=pointer(call, "x"),
        norm_ptr=pointer(call, "norm"),
        rows_ptr=pointer(call, "rows"),
        codes_ptr=workspace("fp8e4nv"),
        scales_ptr=scales_pointer(s),
        LIVE=call.attrs.get("live_index", 0),
        K=s.k,
        EPS=_eps(call),
        BLOCK=block,
    )


def _eps(call: CallShape) -> float:
    return float(call.attrs.get("eps", 0.0)) if "norm" in call.shapes else 0.0


def _tiles(s: Sizes, config: TileConfig) -> int:
    return _ceil(s.rows, config.block_m) * _ceil(s.outputs, config.block_n)


def _shared(s: Sizes, config: TileConfig) -> int:
    weights = (2 if s.gated else 1) * config.block_n
    return config.stages * (weights + config.block_m) * config.block_k


def _valid(call: CallShape, config: TileConfig) -> str | None:
    s = sizes(call)
    if not config.rows_first and s.rows > FEW:
        return f"{s.rows} rows, codes are made by every program of {FEW} at most"
    if not 32 <= config.block_k <= STEP:
        return f"block_k {config.block_k}, 32 at least and {STEP} at most (exact sums)"
    if config.tma and s.k % 16:
        return f"rows of {s.k} bytes cannot be described to TMA, multiples of 16 can"
    if config.split > _ceil(s.k, config.block_k):
        return f"split {config.split} of {_ceil(s.k, config.block_k)} steps"
    # The sums of one product stand beside the float32 ones they are added to.
    each = config.block_n * config.block_m // (32 * config.warps)
    held = each * (3 if s.gated else 2)
    if held > ACCUMULATORS:
        return f"{held} accumulators per thread, {ACCUMULATORS} at most"
    if _shared(s, config) > SHARED - 2048:
        return f"{_shared(s, config)} bytes of shared memory, {SHARED} at most"
    if config.split > 1 and _tiles(s, config) * 4 > COUNTERS_BYTES:
        return f"{_tiles(s, config)} tiles need more than {COUNTERS_BYTES // 4} counters"
    return None


def _default(call: CallShape) -> TileConfig:
    s = sizes(call)
    if s.rows <= 64:
        # A processor needs about 30 KiB on their way. Two programs fit beside each other, each with
        # 32 KiB of weights and more under way.
        block_m = max(power(s.rows), 16)
        stages = 4 if s.gated else 6 if block_m == 64 else 8
        config = TileConfig(block_n=64, block_m=block_m, block_k=STEP, stages=stages)
        wanted = 2 * PROCESSORS
    else:
        # Two warp groups with 64 float32 sums per thread (gated: twice 64), and 64 of the step: the
        # largest tiles that registers allow, because tiles are read from the second-level cache
        # more slowly than the tensor cores take them.
        config = TileConfig(block_n=128, block_m=128, block_k=STEP, warps=8, stages=4)
        wanted = PROCESSORS
    config = replace(
        config,
        block_k=min(config.block_k, max(power(s.k), 32)),
        tma=s.k % 16 == 0,
        rows_first=s.rows > FEW,
    )
    tiles = _tiles(s, config)
    programs = PROCESSORS if s.rows > 256 and tiles > PROCESSORS else 0
    split = split_for(tiles, _ceil(s.k, config.block_k), wanted, 4)
    return replace(config, programs=programs, split=split)


def _space(call: CallShape) -> list[TileConfig]:
    s = sizes(call)
    if s.rows <= 64:
        least = max(power(s.rows), 16)
        return [
            TileConfig(
                block_n=n,
                block_m=m,
                block_k=STEP,
                split=split,
                warps=warps,
                stages=stages,
                rows_first=first,
            )
            for n, warps in ((64, 4), (128, 4), (128, 8))
            for m in sorted({least, min(least, 32)})
            for split in (1, 2, 4, 8)
            for stages in (4, 6, 8)
            for first in ((True, False) if s.rows <= FEW else (True,))
        ]
    return [
        TileConfig(
            block_n=n,
            block_m=m,
            block_k=STEP,
            split=split,
            warps=warps,
            stages=stages,
            programs=programs,
            rows_first=True,
        )
        for n, m, warps in (
            *((64, 64, 4), (64, 128, 4), (128, 64, 4)),
            *((128, 64, 8), (128, 128, 8), (256, 64, 8)),
        )
        for split in ((1, 2, 4) if s.rows <= 256 else (1,))
        for stages in (3, 4, 5)
        for programs in (0, PROCESSORS, 2 * PROCESSORS)
    ]


def _launches(call: CallShape, config: TileConfig) -> tuple[Launch, ...]:
    s, w = sizes(call), weight_of(call)
    first = (rows_launch(call, s),) if config.rows_first else ()
    split = config.split > 1
    after = codes_bytes(s) + scales_bytes(s) if config.rows_first else 0
    rows = power(min(s.rows, FEW))
    constants: dict[str, Any] = {
        "LIVE": call.attrs.get("live_index", 0),
        "OUTPUTS": s.outputs,
        "K": s.k,
        "EPS": 0.0 if config.rows_first else _eps(call),
        "ACT": call.attrs.get("act", ""),
        "GATED": s.gated,
        "SCALE": float(call.attrs["scale"]),
        "SOFTCAP": float(call.attrs["softcap"]),
        "X_TMA": config.rows_first and config.tma,
        "W_TMA": config.tma,
        "ROWS": 0 if config.rows_first else rows,
        "BLOCK_X": 0 if config.rows_first else min(power(s.k), 4096 // rows),
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "SPLIT": config.split,
        "SUPER": min(8, _ceil(s.rows, config.block_m)),
        "PROGRAMS": config.programs,
        "STAGES": config.stages,
    }
    x: Slot | None = pointer(call, "x")
    if config.rows_first:
        x = Pointer(arg=WORKSPACE, type="fp8e4nv")
        if config.tma:
            x = _map(WORKSPACE, "", (s.rows, s.k), (config.block_m, config.block_k))
    data = stored("w", "data", "fp8e4nv")
    weights: Slot = data
    if config.tma:
        shape = (call.shapes["w"][0], s.k)
        weights = _map("w", "data", shape, (config.block_n, config.block_k))
    one_tile = _ceil(s.rows, config.block_m) == 1
    units = _tiles(s, config) * config.split
    return (
        *first,
        launch(
            "linear_fp8.tiles_kernel",
            (min(units, config.programs) if config.programs else units, 1, 1),
            warps=config.warps,
            stages=config.stages,
            live_ptr=pointer(call, "live"),
            x=x,
            x_scale_ptr=scales_pointer(s) if config.rows_first else None,
            w=weights,
            w_ptr=data if one_tile and fetches_ahead(s.k, w, config.block_k) else None,
            scale_ptr=stored("w", "scale", "fp32"),
            bias_ptr=pointer(call, "bias"),
            norm_ptr=None if config.rows_first else pointer(call, "norm"),
            residual_ptr=pointer(call, "residual"),
            rows_ptr=None if config.rows_first else pointer(call, "rows"),
            residual_rows_ptr=pointer(call, "residual_rows"),
            out_ptr=pointer(call, "out"),
            part_ptr=workspace("fp32", after) if split else None,
            counter_ptr=counters() if split else None,
            **constants,
        ),
    )


def _map(arg: str, field: str, shape: tuple[int, int], block: tuple[int, int]) -> Descriptor:
    return Descriptor(
        arg=arg,
        field=field,
        type=TYPES["float8_e4m3fn"],
        shape=shape,
        strides=(shape[1], 1),
        block=block,
    )


def _workspace(call: CallShape, config: TileConfig) -> int:
    s = sizes(call)
    rows = codes_bytes(s) + scales_bytes(s) if config.rows_first else 0
    if config.split == 1:
        return rows
    # As `reduce` lays partial sums out.
    each = config.block_n * config.block_m * (2 if s.gated else 1) + config.block_m
    return rows + _tiles(s, config) * config.split * each * 4


register(
    CudaKernel(
        name="linear_fp8",
        op="linear",
        accepts=refuse_formats,
        space=_space,
        default=_default,
        valid=_valid,
        launches=_launches,
        workspace=_workspace,
    )
)
