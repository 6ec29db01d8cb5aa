"""Registration of the CUDA kernels of `linear`. Imported by kernels/cuda/register.py.

Three regimes, one op. One row streams weights through the ordinary cores (`linear_vector`). Few
rows stream weights through tensor cores, many programs over output tiles and splits of the inputs,
norm and row choice fused (`linear_tiles`, one launch). Many rows are compute bound: large tiles,
TMA on both sides, a fixed number of programs walking the live tiles, norm and row choice as a first
launch. The last two are one device function in different configurations, so the tuner may choose
any mixture.

A fused norm is one pass: rsqrt(mean x^2 + eps) * ((x * weight) W^T), the squares summed while the
tiles of x go by, so x * weight is what is rounded to bfloat16, not the normalised row (a first
launch rounds that). Every column of tiles repeats the products with the norm's weight. In a decode
bucket of many rows that is still done, to save the launch: with float weights the rows are then the
left operand (`x_left`), which wgmma takes from registers, and the work overlaps the tensor cores'.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kernels.cuda.kernel import (
    SIZES,
    TYPES,
    CudaKernel,
    launch,
    pointer,
    register,
    stored,
    workspace,
)
from kernels.cuda.product import (
    SHARED,
    TileConfig,
    VectorConfig,
    Weight,
    fetches_ahead,
    half,
    logits,
    part_bytes,
    product_arguments,
    refuse_counters,
    refuse_shared,
    resplit,
    sizes,
    split_for,
    splits_to_try,
    step_bytes,
    tile_count,
    tile_reason,
    weight_of,
    weight_slot,
)
from kernels.cuda.rows import PROCESSORS, cdiv, power
from kernels.kernel import CallShape
from kernels.launch import WORKSPACE, Descriptor, Launch, Pointer, Slot


def _ends(call: CallShape) -> dict[str, Any]:
    """Arguments of linear's own epilogue."""
    attrs = call.attrs
    return {
        "rows_ptr": pointer(call, "rows"),
        "residual_ptr": pointer(call, "residual"),
        "residual_rows_ptr": pointer(call, "residual_rows"),
        "out_ptr": pointer(call, "out"),
        "ACT": attrs.get("act", ""),
        "GATED": sizes(call).gated,
        "SCALE": float(attrs["scale"]),
        "SOFTCAP": float(attrs["softcap"]),
    }


def refuse_quantized(call: CallShape) -> str | None:
    """Activations that are quantized, and the maxima that this takes, have kernels of their own."""
    x_format = call.attrs.get("x_format")
    if x_format:
        return f"x is quantized to {x_format}"
    return "maxima of rows are not written" if "out_amax" in call.shapes else None


def _vector_accepts(call: CallShape) -> str | None:
    rows = call.shapes["out"][0]
    return refuse_quantized(call) if rows == 1 else f"one row only, the call has {rows}"


def _vector_valid(call: CallShape, config: VectorConfig) -> str | None:
    s, w = sizes(call), weight_of(call)
    if w.group and config.block_k % w.group:
        return f"block_k {config.block_k} is not a multiple of the group {w.group}"
    if config.split > cdiv(s.k, config.block_k):
        return f"split {config.split} of {cdiv(s.k, config.block_k)} steps"
    each = 2 if s.gated else 1
    shared = config.stages * each * config.block_n * int(config.block_k * w.row_bytes)
    if config.stages > 1 and shared > SHARED:
        return f"{shared} bytes of shared memory, {SHARED} at most"
    held = each * config.block_n * (config.block_k // w.per) // (32 * config.warps)
    if held > 64:
        return f"{held} sums per thread, 64 at most"
    return refuse_counters(cdiv(s.outputs, config.block_n)) if config.split > 1 else None


def _vector_space(call: CallShape) -> list[VectorConfig]:
    w = weight_of(call)
    return [
        VectorConfig(block_n=n, block_k=width * w.per, split=split, warps=warps, stages=stages)
        for n in (4, 8, 16)
        for width in ((128, 256) if w.bits else (256, 512, 1024))
        for split in (1, 2, 4)
        for warps in (4, 8)
        for stages in (1, 3, 5)
    ]


def _vector_default(call: CallShape) -> VectorConfig:
    s, w = sizes(call), weight_of(call)
    block_k = min(max(512 // SIZES[w.type] * 2 * w.per, w.group), power(s.k))
    block_k = max(block_k, w.group, 16)
    block_n = 16 >> (s.gated + w.row_scale)  # sums per thread: fp8 rows are twice as long
    tiles = cdiv(s.outputs, block_n)
    return VectorConfig(
        block_n=block_n,
        block_k=block_k,
        split=split_for(tiles, cdiv(s.k, block_k), 2 * PROCESSORS, 4),
        warps=4,
        stages=4,
    )


def vector_launch(
    call: CallShape, config: VectorConfig, function: str, ends: dict[str, Any]
) -> Launch:
    """`function` with the arguments of a product of one row, and `ends` for what it makes of it."""
    s, w = sizes(call), weight_of(call)
    arguments = product_arguments(call, config, s, w) | ends
    return launch(
        function,
        (cdiv(s.outputs, config.block_n) * config.split, 1, 1),
        warps=config.warps,
        stages=config.stages,
        live_ptr=pointer(call, "live"),
        x_ptr=pointer(call, "x"),
        w_ptr=stored("w", "data", w.type),
        norm_ptr=pointer(call, "norm"),
        AHEAD=fetches_ahead(s.k, w, config.block_k),
        **arguments,
    )


def _vector_workspace(call: CallShape, config: VectorConfig) -> int:
    s = sizes(call)
    return part_bytes(cdiv(s.outputs, config.block_n) * config.split, config, 1, s.gated)


VECTOR = register(
    CudaKernel(
        name="linear_vector",
        op="linear",
        accepts=_vector_accepts,
        space=_vector_space,
        default=_vector_default,
        valid=_vector_valid,
        launches=lambda call, config: (
            vector_launch(call, config, "linear_vector.vector_kernel", _ends(call)),
        ),
        workspace=_vector_workspace,
    )
)


# ---- tiles ---------------------------------------------------------------------------


def _rows_bytes(call: CallShape, config: TileConfig) -> int:
    if not config.rows_first:
        return 0
    s = sizes(call)
    return cdiv(s.rows * s.k * SIZES[TYPES[call.dtypes["x"]]], 256) * 256


def x_tma(call: CallShape, config: TileConfig, w: Weight, k: int) -> bool:
    """Whether activation rows are read by tensor map: all of them, and those on the right as they
    are."""
    aligned = k * SIZES[TYPES[call.dtypes["x"]]] % 16 == 0
    whole = "rows" not in call.shapes and (config.x_left or "norm" not in call.shapes)
    return config.tma and not w.bits and aligned and (config.rows_first or whole)


def _tile_valid(call: CallShape, config: TileConfig) -> str | None:
    s, w = sizes(call), weight_of(call)
    reason = tile_reason(config, w, outputs=s.outputs, k=s.k, gated=s.gated, half=half(call))
    if reason:
        return reason
    if config.rows_first and "norm" not in call.shapes and "rows" not in call.shapes:
        return "there is nothing to do for a first launch"
    if config.x_left and (not half(call) or w.type != "bf16"):
        return f"weights as {call.formats['w']} are decoded in registers, on the left"
    if config.x_left and config.block_m < 64:
        return f"block_m {config.block_m} on the left, 64 at least"
    if config.programs:
        # Results change their layout through shared memory, beside the operands of the next tile:
        # in parts, but as they are summed where rows have scales. Bounds of what cubins take.
        size, most = (4, 1 << 16) if w.row_scale else (2, 1 << 14)
        results = min(size * config.block_n * config.block_m, most)
        step = step_bytes(config, w, gated=s.gated, half=half(call))
        if reason := refuse_shared(config.stages * step + results):
            return reason
    tiles = tile_count(s, config.block_n, config.block_m)
    return refuse_counters(tiles) if config.split > 1 else None


def _tile_default(call: CallShape) -> TileConfig:
    s, w = sizes(call), weight_of(call)
    fused = "norm" in call.shapes or "rows" in call.shapes
    # In a decode bucket a launch of its own is saved; not before the head, which has by far the
    # most columns of tiles and stands once in a step.
    rows_first = fused and s.rows > 64 and (call.kind != "decode" or logits(call))
    norm_inside = "norm" in call.shapes and not rows_first
    x_left = False
    aligned = int(s.k * w.row_bytes) % 16 == 0
    if not half(call):  # the ordinary cores multiply float32: small tiles
        block_k = max(32 * (1 if not w.bits else 16 * w.per // 32), w.group)
        config = TileConfig(block_n=32, block_m=16, block_k=block_k, warps=4, stages=2, tma=False)
        if s.rows > 64:
            config = TileConfig(
                block_n=64, block_m=32, block_k=block_k, warps=4, stages=2, tma=False
            )
        tiles = tile_count(s, config.block_n, config.block_m)
        return resplit(config, tiles, cdiv(s.k, block_k), 2 * PROCESSORS, 8)
    if s.rows <= 64:
        block_m = max(power(s.rows), 16)
        # 16 KiB of weights per step (8 KiB of int4): with four steps on their way and two programs
        # beside each other a processor has 100 KiB and more in flight; it needs about 30.
        block_k = {"bf16": 128, "fp8e4nv": 256, "i32": 256 if w.bits == 4 else 128}[w.type]
        if block_m == 64 and (
            (w.type == "fp8e4nv" and norm_inside) or (w.type != "bf16" and s.gated)
        ):
            block_k = 128  # registers
        block_n = 64
        wanted, warps, stages = 2 * PROCESSORS, 4, 4
        if s.gated and w.type == "bf16":
            stages = 3
        if w.bits:
            stages = 3
    else:
        block_m = 128 if s.rows <= 128 or s.gated or w.bits else 256
        block_n = 128
        block_k = 64 if not w.bits else 128
        wanted, warps, stages = PROCESSORS, 8, 3
        if w.type == "fp8e4nv":
            block_k = 128
            if norm_inside:  # registers
                block_m = 64 if s.gated else 128
        if w.bits and s.gated:  # each pair of warp groups decodes rows of its own
            block_m = 64
        if norm_inside and w.type == "bf16":  # wide tiles: fewer products with the norm's weight
            x_left, block_m, block_n = True, 128, 128 if s.gated or s.rows <= 128 else 256
    block_k = max(block_k, w.group, 16 * w.per)
    if s.k < block_k:
        block_k = max(power(s.k), w.group, 16 * w.per)
    row_tiles, column_tiles = cdiv(s.rows, block_m), cdiv(s.outputs, block_n)
    tiles = row_tiles * column_tiles
    config = TileConfig(
        block_n=block_n,
        block_m=block_m,
        block_k=block_k,
        warps=warps,
        stages=stages,
        tma=aligned,
        programs=PROCESSORS if s.rows > 256 and tiles > PROCESSORS else 0,
        rows_first=rows_first,
        x_left=x_left,
    )
    config = resplit(config, tiles, cdiv(s.k, block_k), wanted, 4)
    while _tile_valid(call, config) is not None and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    return config


def _tile_space(call: CallShape) -> list[TileConfig]:
    s, w = sizes(call), weight_of(call)
    fused = "norm" in call.shapes or "rows" in call.shapes
    if not half(call):
        return [
            TileConfig(block_n=n, block_m=m, block_k=k, split=split, warps=4, stages=2, tma=False)
            for n in (32, 64)
            for m in (16, 32)
            for k in (32, 64)
            for split in (1, 4)
        ]
    if s.rows <= 64:
        least = max(power(s.rows), 16)
        return [
            TileConfig(
                block_n=n, block_m=m, block_k=k, split=split, warps=warps, stages=stages, tma=tma
            )
            for n, warps in ((64, 4), (128, 4), (128, 8))
            for m in sorted({least, min(least, 32)})
            for k in ((64, 128, 256) if not w.bits else (128, 256, 512))
            for split in (1, 2, 4, 8)
            for stages in (3, 4, 6)
            for tma in (True, False)
        ]
    left = "norm" in call.shapes and w.type == "bf16"
    return [
        TileConfig(
            block_n=n,
            block_m=m,
            block_k=k,
            split=split,
            warps=8,
            stages=stages,
            programs=programs,
            rows_first=first,
            x_left=left and not first,
        )
        for n, m in ((64, 128), (64, 256), (128, 128), (128, 256), (256, 128))
        for k in ((64, 128) if not w.bits else (128, 256))
        for split in (splits_to_try(tile_count(s, n, m)) if s.rows <= 256 else (1,))
        for stages in (3, 4)
        for programs in (0, PROCESSORS)
        for first in ((True, False) if fused else (False,))
    ]


def tile_launches(
    call: CallShape, config: TileConfig, function: str, ends: dict[str, Any]
) -> tuple[Launch, ...]:
    """`function` with the arguments of a product of tiles, and `ends` for what it makes of them;
    before it what `rows_first` asks for."""
    s, w = sizes(call), weight_of(call)
    live = pointer(call, "live")
    type = TYPES[call.dtypes["x"]]
    arguments = product_arguments(call, config, s, w) | ends
    arguments["norm_ptr"] = pointer(call, "norm")
    launches: tuple[Launch, ...] = ()
    x_arg, x_rows = "x", call.shapes["x"][0]
    if config.rows_first:
        launches = (
            launch(
                "linear_tiles.rows_kernel",
                (s.rows, 1, 1),
                warps=4,
                live_ptr=live,
                x_ptr=pointer(call, "x"),
                norm_ptr=arguments["norm_ptr"],
                rows_ptr=arguments["rows_ptr"],
                out_ptr=workspace(type),
                LIVE=arguments["LIVE"],
                K=s.k,
                EPS=arguments["EPS"],
                BLOCK=min(power(s.k), 4096),
            ),
        )
        arguments["norm_ptr"] = arguments["rows_ptr"] = None
        x_arg, x_rows = WORKSPACE, s.rows
        if arguments["part_ptr"] is not None:
            arguments["part_ptr"] = workspace("fp32", _rows_bytes(call, config))
    by_map = x_tma(call, config, w, s.k)
    x: Slot = Pointer(arg=x_arg, type=type)
    if by_map:
        x = Descriptor(
            arg=x_arg,
            type=type,
            shape=(x_rows, s.k),
            strides=(s.k, 1),
            block=(config.block_m, config.block_k),
        )
    weight_rows = call.shapes["w"][0]
    data = stored("w", "data", w.type)
    row_tiles = cdiv(s.rows, config.block_m)
    units = row_tiles * cdiv(s.outputs, config.block_n) * config.split
    return (
        *launches,
        launch(
            function,
            (min(units, config.programs) if config.programs else units, 1, 1),
            warps=config.warps,
            stages=config.stages,
            live_ptr=live,
            x=x,
            w=weight_slot("w", w, weight_rows, s.k, config),
            w_ptr=data if row_tiles == 1 and fetches_ahead(s.k, w, config.block_k) else None,
            X_TMA=by_map,
            W_TMA=config.tma,
            HALF=half(call),
            BLOCK_M=config.block_m,
            X_LEFT=config.x_left,
            SUPER=min(8, row_tiles),
            PROGRAMS=config.programs,
            **arguments,
        ),
    )


def _tile_workspace(call: CallShape, config: TileConfig) -> int:
    s = sizes(call)
    tiles = tile_count(s, config.block_n, config.block_m)
    parts = part_bytes(tiles * config.split, config, config.block_m, s.gated)
    return _rows_bytes(call, config) + parts


TILES = register(
    CudaKernel(
        name="linear_tiles",
        op="linear",
        accepts=refuse_quantized,
        space=_tile_space,
        default=_tile_default,
        valid=_tile_valid,
        launches=lambda call, config: tile_launches(
            call, config, "linear_tiles.tiles_kernel", _ends(call)
        ),
        workspace=_tile_workspace,
    )
)
