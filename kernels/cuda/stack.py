"""Tiles of products with a stack of matrices [E, N, K], one of which every activation row (or every
head of it) meets: shared by experts and heads.

There are many matrices and each is small, so the matrices alone fill the processors: no tile is
split over inputs, walks further tiles or has a first launch.
"""

from __future__ import annotations

from dataclasses import replace

from kernels.cuda.product import TileConfig, half, tile_reason, weight_of
from kernels.cuda.rows import power
from kernels.kernel import CallShape


def stack_reason(
    call: CallShape, config: TileConfig, *, outputs: int, k: int, gated: bool = False
) -> str | None:
    """Why a configuration cannot be used."""
    if config.split > 1 or config.programs or config.rows_first:
        return "a stack is not split over inputs, not persistent and has no first launch"
    return tile_reason(config, weight_of(call), outputs=outputs, k=k, gated=gated, half=half(call))


def stack_default(
    call: CallShape, *, rows: int, outputs: int, k: int, gated: bool = False
) -> TileConfig:
    """`rows`: activation rows that meet one matrix."""
    w = weight_of(call)
    least = max(16 * w.per, w.group)
    if not half(call):  # the ordinary cores multiply float32: small tiles
        return TileConfig(block_n=32, block_m=16, block_k=max(least, 32), stages=2, tma=False)
    aligned = int(k * w.row_bytes) % 16 == 0
    block_m = min(max(power(rows), 16), 128)
    if block_m <= 64:
        config = TileConfig(block_n=64, block_m=block_m, block_k=128, stages=4, tma=aligned)
    else:
        config = TileConfig(
            block_n=128, block_m=block_m, block_k=64, warps=8, stages=3, tma=aligned
        )
        if w.bits and gated:  # each pair of warp groups decodes rows of its own
            config = replace(config, block_m=64)
    config = replace(config, block_k=max(min(config.block_k, power(k)), least))
    while (
        config.stages > 2
        and stack_reason(call, config, outputs=outputs, k=k, gated=gated) is not None
    ):
        config = replace(config, stages=config.stages - 1)
    return config


def stack_space(call: CallShape, default: TileConfig) -> list[TileConfig]:
    if not half(call):
        return [default]
    return [
        TileConfig(block_n=n, block_m=m, block_k=k, warps=warps, stages=stages, tma=tma)
        for n, warps in ((64, 4), (128, 4), (128, 8))
        for m in (16, 32, 64, 128)
        for k in ((128, 256) if weight_of(call).bits else (64, 128))
        for stages in (2, 3, 4)
        for tma in (True, False)
    ]
