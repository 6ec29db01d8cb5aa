"""Registration of the CUDA kernels of norms. Imported by kernels/cuda/register.py."""

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

WIDEST = 16384  # columns that a program of 16 warps keeps in registers


def units(call: CallShape) -> tuple[int, int]:
    """Norms to take and the width of each."""
    rows, width = call.shapes["x"]
    heads = call.attrs.get("heads", 1)
    return rows * heads, width // heads


def _accepts(call: CallShape) -> str | None:
    width = units(call)[1]
    if width > WIDEST:
        return f"rows of {width} are wider than {WIDEST}"
    return refuse_types(call, "x", "w", "bias", "residual", "out")


def _launches(call: CallShape, config: TileConfig) -> tuple[Launch, ...]:
    count, width = units(call)
    heads = call.attrs.get("heads", 1)
    return (
        launch(
            "norm.norm_kernel",
            (-(-count // config.rows), 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            x_ptr=pointer(call, "x"),
            w_ptr=pointer(call, "w"),
            bias_ptr=pointer(call, "bias"),
            residual_ptr=pointer(call, "residual"),
            out_ptr=pointer(call, "out"),
            LIVE=call.attrs.get("live_index", 0),
            EPS=float(call.attrs["eps"]),
            CENTRE=bool(call.attrs.get("centre", call.op == "layer_norm")),
            HEADS=heads,
            OWN=heads > 1 and call.shapes["w"][0] == heads * width,
            WIDTH=width,
            ROWS=config.rows,
            BLOCK=power(width),
        ),
    )


for _op in ("rms_norm", "layer_norm", "head_norm"):
    register(
        CudaKernel(
            name=_op,
            op=_op,
            accepts=_accepts,
            space=tile_space,
            valid=lambda call, config: tile_valid(units(call)[1], config),
            default=lambda call: tile_default(*units(call)),
            launches=_launches,
        )
    )
