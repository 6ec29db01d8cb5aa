"""Registration of the CUDA kernels that take rows out of tables. Imported by
kernels/cuda/register.py."""

from __future__ import annotations

from collections.abc import Mapping

from kernels.cuda.kernel import CudaKernel, launch, pointer, register, stored
from kernels.cuda.layout import parse_format
from kernels.cuda.rows import AMAX_WIDTH, RowConfig, refuse_types, row_default, row_grid, row_space
from kernels.kernel import CallShape
from kernels.launch import Constant, Launch, Slot

# Storage format of a table: element type of its data and bits of a code (0: no codes).
STORED: Mapping[str, tuple[str, int]] = {
    "float32": ("fp32", 0),
    "bfloat16": ("bf16", 0),
    "fp8": ("fp8e4nv", 0),
    "int8": ("i32", 8),
    "int4": ("i32", 4),
}


def _table(call: CallShape, arg: str) -> dict[str, Slot | Constant]:
    kind, group = parse_format(call.formats[arg])
    type, _ = STORED[kind]
    scale = "fp16" if group else "fp32" if kind == "fp8" else ""
    return {
        "data": stored(arg, "data", type),
        "scale": stored(arg, "scale", scale) if scale else None,
    }


def _codes(call: CallShape) -> tuple[int, int]:
    """Bits of a code, 0 for float formats, and columns per scale."""
    kind, group = parse_format(call.formats["table"])
    return STORED[kind][1], group or call.shapes["table"][1]


def _accepts_table(call: CallShape) -> str | None:
    width = call.shapes["table"][1]
    for arg in ("table", "types"):
        name = call.formats.get(arg, call.formats["table"])
        try:
            kind, group = parse_format(name)
        except ValueError as error:
            return str(error)
        if kind not in STORED:
            return f"{arg} is stored as {name}: supported are {', '.join(STORED)}"
        if group and width % group:
            return f"D={width} is not a multiple of the quantization group {group}"
        if name != call.formats["table"]:
            return f"{arg} is stored as {name}, the table as {call.formats['table']}"
    return refuse_types(call, "x", "out")


def _embed(call: CallShape, config: RowConfig) -> tuple[Launch, ...]:
    rows, width = call.shapes["out"]
    bits, group = _codes(call)
    table = _table(call, "table")
    return (
        launch(
            "embed.embed_kernel",
            row_grid(rows, width, config),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            tokens_ptr=pointer(call, "tokens"),
            last_ptr=pointer(call, "last_token"),
            data_ptr=table["data"],
            scale_ptr=table["scale"],
            out_ptr=pointer(call, "out"),
            amax_norm_ptr=pointer(call, "amax_norm"),
            amax_ptr=pointer(call, "out_amax"),
            SCALE=float(call.attrs["scale"]),
            BITS=bits,
            GROUP=group,
            WIDTH=width,
            PART=AMAX_WIDTH,
            BLOCK=config.block,
        ),
    )


def _embed_positions(call: CallShape, config: RowConfig) -> tuple[Launch, ...]:
    rows, width = call.shapes["out"]
    bits, group = _codes(call)
    table, types = _table(call, "table"), _table(call, "types")
    return (
        launch(
            "embed.embed_positions_kernel",
            row_grid(rows, width, config),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            x_ptr=pointer(call, "x"),
            positions_ptr=pointer(call, "positions"),
            data_ptr=table["data"],
            scale_ptr=table["scale"],
            types_ptr=types["data"],
            types_scale_ptr=types["scale"],
            out_ptr=pointer(call, "out"),
            OFFSET=int(call.attrs["offset"]),
            BITS=bits,
            GROUP=group,
            WIDTH=width,
            BLOCK=config.block,
        ),
    )


def _gather(call: CallShape, config: RowConfig) -> tuple[Launch, ...]:
    rows, width = call.shapes["out"]
    return (
        launch(
            "embed.gather_kernel",
            row_grid(rows, width, config),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            x_ptr=pointer(call, "x"),
            rows_ptr=pointer(call, "rows"),
            out_ptr=pointer(call, "out"),
            WIDTH=width,
            BLOCK=config.block,
        ),
    )


for _op, _accepts, _launches in (
    ("embed", _accepts_table, _embed),
    ("embed_positions", _accepts_table, _embed_positions),
    ("gather", lambda call: refuse_types(call, "x", "out"), _gather),
):
    register(
        CudaKernel(
            name=_op,
            op=_op,
            accepts=_accepts,
            space=row_space,
            default=lambda call: row_default(call.shapes["out"][1]),
            launches=_launches,
        )
    )
