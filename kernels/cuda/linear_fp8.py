"""Registration of the CUDA kernel of `linear` on fp8 activations and fp8 weights (x_format "fp8").
Imported by kernels/cuda/register.py.

Where codes of the rows are made follows from whether their largest numbers are known. With
`x_amax` every program of the product makes the codes of the tiles it reads, and there is no other
launch. Without, a first launch finds the largest numbers and makes the codes, normalised and
chosen (`rows_first`); up to FEW rows every program finds them itself, because a launch would cost
more than reading a row twice does. So the program decides (compiler/maxima.py): calls of few tokens
have `x_amax`, calls of many have not, because each column of tiles makes all codes again. Before
the head, which has by far the most columns, a first launch is taken from more than 64 rows on.

Codes from a first launch are read by tensor map and multiplied from shared memory, at twice the
rate of bfloat16. Those made in the product are the left operand from 64 rows on (`x_left`), which
comes from registers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kernels.cuda.kernel import (
    SIZES,
    TYPES,
    CudaKernel,
    counters,
    launch,
    pointer,
    register,
    stored,
    workspace,
)
from kernels.cuda.product import (
    SHARED,
    Sizes,
    TileConfig,
    fetches_ahead,
    logits,
    part_bytes,
    refuse_counters,
    refuse_shared,
    resplit,
    sizes,
    splits_to_try,
    tile_count,
    weight_of,
)
from kernels.cuda.rows import AMAX_WIDTH, PROCESSORS, cdiv, power, refuse_types
from kernels.kernel import CallShape
from kernels.launch import WORKSPACE, Descriptor, Launch, Pointer, Slot

FEW = 4  # rows of which every program finds the largest numbers itself
FEW_LOGITS = 64  # rows before the head of which every program makes the codes
STEP = 128  # inputs whose products the tensor cores may add by themselves
ROW_BLOCK = 16384  # numbers of a row that one program keeps in registers
ACCUMULATORS = 192  # per thread, the sums of a step among them
ALIGN = 256


def _up(size: int) -> int:
    return cdiv(size, ALIGN) * ALIGN


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


def _step_bytes(call: CallShape, config: TileConfig) -> int:
    """Shared memory that a step of the product takes while it is under way."""
    weights = (2 if sizes(call).gated else 1) * config.block_n
    x = 1 if config.rows_first else SIZES[TYPES[call.dtypes["x"]]]
    return (weights + config.block_m * x) * config.block_k


def _shared(call: CallShape, config: TileConfig) -> int:
    if not config.rows_first:
        # Codes go through shared memory, to be read there or into the registers they are
        # multiplied from.
        more = config.block_m * config.block_k
    elif config.programs:
        # Results change their layout there, beside the operands of the program's next tile.
        size = 4 if "out_amax" in call.shapes else 2
        more = size * config.block_n * config.block_m
    else:
        more = 0
    return config.stages * _step_bytes(call, config) + more


def _valid(call: CallShape, config: TileConfig) -> str | None:
    s = sizes(call)
    if not config.rows_first and "x_amax" not in call.shapes and s.rows > FEW:
        return f"{s.rows} rows without maxima, codes are made by every program of {FEW} at most"
    if config.x_left and config.rows_first:
        return "codes of a first launch are read from shared memory, on the right"
    if config.x_left and config.block_m < 64:
        return f"block_m {config.block_m} on the left, 64 at least"
    if "out_amax" in call.shapes and config.block_n % AMAX_WIDTH:
        return f"block_n {config.block_n}: maxima are of {AMAX_WIDTH} columns"
    if not 32 <= config.block_k <= STEP:
        return f"block_k {config.block_k}, 32 at least and {STEP} at most (exact sums)"
    if config.tma and s.k % 16:
        return f"rows of {s.k} bytes cannot be described to TMA, multiples of 16 can"
    if config.split > cdiv(s.k, config.block_k):
        return f"split {config.split} of {cdiv(s.k, config.block_k)} steps"
    # The sums of one product stand beside the float32 ones they are added to.
    each = config.block_n * config.block_m // (32 * config.warps)
    held = each * (3 if s.gated else 2)
    if held > ACCUMULATORS:
        return f"{held} accumulators per thread, {ACCUMULATORS} at most"
    if reason := refuse_shared(_shared(call, config)):
        return reason
    tiles = tile_count(s, config.block_n, config.block_m)
    return refuse_counters(tiles) if config.split > 1 else None


def _codes_first(call: CallShape) -> bool:
    """Whether a first launch makes the codes."""
    rows = call.shapes["out"][0]
    if "x_amax" not in call.shapes:
        return rows > FEW
    return logits(call) and rows > FEW_LOGITS


def _default(call: CallShape) -> TileConfig:
    s = sizes(call)
    first = _codes_first(call)
    if s.rows <= 64:
        # A processor needs about 30 KiB on their way. Two programs fit beside each other, each with
        # 32 KiB of weights and more under way.
        block_m = max(power(s.rows), 16)
        stages = 4 if s.gated else 6 if block_m == 64 else 8
        config = TileConfig(block_n=64, block_m=block_m, block_k=STEP, stages=stages)
        wanted, room = 2 * PROCESSORS, SHARED // 2
    else:
        # Two warp groups with 64 float32 sums per thread (gated: twice 64), and 64 of the step: the
        # largest tiles that registers allow, because tiles are read from the second-level cache
        # more slowly than the tensor cores take them. Making codes takes registers too.
        narrow = s.gated and not first
        config = TileConfig(
            block_n=64 if narrow else 128, block_m=128, block_k=STEP, warps=8, stages=4
        )
        wanted, room = PROCESSORS, SHARED
    config = replace(
        config,
        block_k=min(config.block_k, max(power(s.k), 32)),
        tma=s.k % 16 == 0,
        rows_first=first,
        x_left=not first and config.block_m >= 64,
    )
    while config.stages > 2 and _shared(call, config) > room - 2048:
        config = replace(config, stages=config.stages - 1)
    tiles = tile_count(s, config.block_n, config.block_m)
    programs = PROCESSORS if s.rows > 256 and tiles > PROCESSORS else 0
    config = resplit(config, tiles, cdiv(s.k, config.block_k), wanted, 4)
    return replace(config, programs=programs)


def _space(call: CallShape) -> list[TileConfig]:
    s = sizes(call)
    # How rows become codes: `rows_first`, `x_left`.
    ways = [(True, False)]
    if s.rows <= FEW or "x_amax" in call.shapes:
        ways += [(False, False), (False, True)]
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
                x_left=left,
            )
            for n, warps in ((64, 4), (128, 4), (128, 8))
            for m in sorted({least, min(least, 32)})
            for split in (1, 2, 4, 8)
            for stages in (3, 4, 6, 8)
            for first, left in ways
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
            rows_first=first,
            x_left=left,
        )
        for n, m, warps in (
            *((64, 64, 4), (64, 128, 4), (128, 64, 4)),
            *((128, 64, 8), (128, 128, 8), (256, 64, 8)),
        )
        for split in (splits_to_try(tile_count(s, n, m)) if s.rows <= 256 else (1,))
        for stages in (3, 4, 5)
        for programs in (0, PROCESSORS, 2 * PROCESSORS)
        for first, left in ways
    ]


def _launches(call: CallShape, config: TileConfig) -> tuple[Launch, ...]:
    s, w = sizes(call), weight_of(call)
    first = (rows_launch(call, s),) if config.rows_first else ()
    split = config.split > 1
    after = codes_bytes(s) + scales_bytes(s) if config.rows_first else 0
    x: Slot | None = pointer(call, "x")
    # Chosen rows, and those that are read once more for their largest numbers, need pointers.
    as_it_is = "x_amax" in call.shapes and "rows" not in call.shapes
    by_map = config.tma and (config.rows_first or as_it_is)
    if config.rows_first:
        x = Pointer(arg=WORKSPACE, type="fp8e4nv")
        if by_map:
            shape = (s.rows, s.k)
            x = _map(WORKSPACE, "", "fp8e4nv", shape, (config.block_m, config.block_k))
    elif by_map:
        type = TYPES[call.dtypes["x"]]
        x = _map("x", "", type, call.shapes["x"], (config.block_m, config.block_k))
    constants: dict[str, Any] = {
        "LIVE": call.attrs.get("live_index", 0),
        "OUTPUTS": s.outputs,
        "K": s.k,
        "EPS": 0.0 if config.rows_first else _eps(call),
        "ACT": call.attrs.get("act", ""),
        "GATED": s.gated,
        "SCALE": float(call.attrs["scale"]),
        "SOFTCAP": float(call.attrs["softcap"]),
        "X_TMA": by_map,
        "W_TMA": config.tma,
        "X_LEFT": config.x_left,
        **_maxima(call, s, config),
        "PART": AMAX_WIDTH,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "SPLIT": config.split,
        "SUPER": min(8, cdiv(s.rows, config.block_m)),
        "PROGRAMS": config.programs,
        "STAGES": config.stages,
    }
    data = stored("w", "data", "fp8e4nv")
    weights: Slot = data
    if config.tma:
        shape = (call.shapes["w"][0], s.k)
        weights = _map("w", "data", "fp8e4nv", shape, (config.block_n, config.block_k))
    one_tile = cdiv(s.rows, config.block_m) == 1
    units = tile_count(s, config.block_n, config.block_m) * config.split
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
            x_amax_ptr=None if config.rows_first else pointer(call, "x_amax"),
            w=weights,
            w_ptr=data if one_tile and fetches_ahead(s.k, w, config.block_k) else None,
            scale_ptr=stored("w", "scale", "fp32"),
            bias_ptr=pointer(call, "bias"),
            norm_ptr=None if config.rows_first else pointer(call, "norm"),
            residual_ptr=pointer(call, "residual"),
            rows_ptr=None if config.rows_first else pointer(call, "rows"),
            residual_rows_ptr=pointer(call, "residual_rows"),
            out_ptr=pointer(call, "out"),
            amax_norm_ptr=pointer(call, "amax_norm"),
            amax_ptr=pointer(call, "out_amax"),
            part_ptr=workspace("fp32", after) if split else None,
            counter_ptr=counters() if split else None,
            **constants,
        ),
    )


def _maxima(call: CallShape, s: Sizes, config: TileConfig) -> dict[str, int]:
    """How a program learns the largest numbers of its rows, if it makes their codes."""
    if config.rows_first:
        return {"ROWS": 0, "PARTS": 0, "BLOCK_X": 0}
    if "x_amax" in call.shapes:
        parts = call.shapes["x_amax"][1]
        block = min(power(parts), max(4096 // config.block_m, 1))
        return {"ROWS": 0, "PARTS": parts, "BLOCK_X": block}
    rows = power(min(s.rows, FEW))
    return {"ROWS": rows, "PARTS": 0, "BLOCK_X": min(power(s.k), 4096 // rows)}


def _map(
    arg: str, field: str, type: str, shape: tuple[int, ...], block: tuple[int, int]
) -> Descriptor:
    return Descriptor(
        arg=arg,
        field=field,
        type=type,
        shape=shape,
        strides=(shape[1], 1),
        block=block,
    )


def _workspace(call: CallShape, config: TileConfig) -> int:
    s = sizes(call)
    rows = codes_bytes(s) + scales_bytes(s) if config.rows_first else 0
    units = tile_count(s, config.block_n, config.block_m) * config.split
    return rows + part_bytes(units, config, config.block_m, s.gated)


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
