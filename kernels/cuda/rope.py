"""Registration of the CUDA kernels of rope: the angle table and the rotation. Imported by
kernels/cuda/register.py."""

from __future__ import annotations

from kernels.cuda.kernel import CudaKernel, launch, pointer, register
from kernels.cuda.rows import (
    TileConfig,
    power,
    refuse_types,
    tile_default,
    tile_space,
    tile_valid,
)
from kernels.kernel import CallShape
from kernels.launch import Launch


def _table(call: CallShape) -> tuple[int, int]:
    tokens, rotary = call.shapes["out"]
    return tokens, rotary // 2


def _heads(call: CallShape) -> tuple[int, int]:
    return call.shapes["x"][0] * call.attrs["heads"], call.attrs["head_dim"]


def _rope_table(call: CallShape, config: TileConfig) -> tuple[Launch, ...]:
    tokens, half = _table(call)
    return (
        launch(
            "rope.rope_table_kernel",
            (-(-tokens // config.rows), 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            positions_ptr=pointer(call, "positions"),
            freq_ptr=pointer(call, "inv_freq"),
            variant_ptr=pointer(call, "variant"),
            out_ptr=pointer(call, "out"),
            SCALE=float(call.attrs["scale"]),
            HALF=half,
            ROWS=config.rows,
            BLOCK=power(half),
        ),
    )


def _rope(call: CallShape, config: TileConfig) -> tuple[Launch, ...]:
    units, dim = _heads(call)
    rotary = call.shapes["table"][1]
    return (
        launch(
            "rope.rope_kernel",
            (-(-units // config.rows), 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            x_ptr=pointer(call, "x"),
            table_ptr=pointer(call, "table"),
            out_ptr=pointer(call, "out"),
            INTERLEAVED=bool(call.attrs["interleaved"]),
            HEADS=call.attrs["heads"],
            DIM=dim,
            START=call.attrs["start"],
            ROTARY=rotary,
            ROWS=config.rows,
            PAIRS=power(rotary // 2),
            REST=power(dim - rotary),
        ),
    )


register(
    CudaKernel(
        name="rope_table",
        op="rope_table",
        accepts=lambda call: refuse_types(call, "inv_freq"),
        space=tile_space,
        valid=lambda call, config: tile_valid(_table(call)[1], config),
        default=lambda call: tile_default(*_table(call)),
        launches=_rope_table,
    )
)

register(
    CudaKernel(
        name="rope",
        op="rope",
        accepts=lambda call: refuse_types(call, "x", "out"),
        space=tile_space,
        valid=lambda call, config: tile_valid(_heads(call)[1], config),
        default=lambda call: tile_default(*_heads(call)),
        launches=_rope,
    )
)
