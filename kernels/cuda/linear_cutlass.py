"""Registration of the CUTLASS kernel of `linear` for many rows: candidates of the tuner beside the
Triton tiles of kernels/cuda/linear.py. Imported by kernels/cuda/register.py.

A product of many rows is bound by the tensor cores, and those are fed best by a persistent kernel
with warps of its own for the loads, which Triton cannot express on every version we support. It is
CUDA C++ on the CuTe headers of `nvidia-cutlass`, built by nvcc, not CuTe DSL: the headers are under
BSD-3 (the DSL's licence is proprietary and forbids standing in for its host library), and the
parameters are ours (two tensor maps and pointers, which the runtime writes as it writes Triton's),
where the DSL computes some of its kernels' parameters on the host.

A norm, a choice of rows and the codes of fp8 activations are made in a first launch, as with large
Triton tiles. Never chosen by the heuristic: the tuner compares it with the reference on the device
before it is timed. Without nvcc the kernel refuses every call, with the remedy as the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kernels.cuda import nvcc
from kernels.cuda.kernel import (
    SIZES,
    Config,
    CudaKernel,
    launch,
    pointer,
    register,
    stored,
    workspace,
)
from kernels.cuda.linear_fp8 import (
    codes_bytes,
    refuse_formats,
    rows_launch,
    scales_bytes,
    scales_pointer,
)
from kernels.cuda.product import SHARED, Sizes, sizes
from kernels.cuda.rows import PROCESSORS, cdiv, power, refuse_types
from kernels.kernel import CallShape
from kernels.launch import WORKSPACE, Descriptor, Launch

LEAST_ROWS = 65  # fewer fill half a tile at most
WIDTHS = (64, 96, 128, 192, 256)  # as CuTe selects instructions
SPAN = 128  # bytes of a row in a tile: the swizzle's span


@dataclass(frozen=True, slots=True, kw_only=True)
class CutlassConfig(Config):
    """A tile of `block_m` rows and `block_n` weight rows (a gated product: half of them gate, half
    up), `stages` of it in flight; `cluster` programs share the weights' tile; `super` row tiles
    (of clusters) stand beside each other in the order of tiles."""

    block_m: int
    block_n: int
    stages: int
    cluster: int = 1
    super: int = 8


def _shared(config: CutlassConfig) -> int:
    """Bytes: the ring of tiles, its barriers, and 2 KiB to align both."""
    return config.stages * ((config.block_m + config.block_n) * SPAN + 16) + 2048


def _fp8(call: CallShape) -> bool:
    return call.attrs.get("x_format", "") == "fp8"


def _size(call: CallShape) -> int:
    """Bytes of a multiplied number."""
    return 1 if _fp8(call) else SIZES["bf16"]


def _accepts(call: CallShape) -> str | None:
    s = sizes(call)
    if reason := nvcc.missing():
        return reason
    if _fp8(call):
        if reason := refuse_formats(call):
            return reason
    elif call.dtypes["x"] != "bfloat16" or call.formats["w"] != "bfloat16":
        return f"x is {call.dtypes['x']}, w {call.formats['w']}: both must be bfloat16"
    if "out_amax" in call.shapes:
        return "maxima of rows are not written"
    if s.rows < LEAST_ROWS:
        return f"{s.rows} rows, {LEAST_ROWS} at least"
    if s.k * _size(call) % 16 or s.outputs % 8:
        return f"K {s.k} and outputs {s.outputs} must be multiples of {16 // _size(call)} and 8"
    return refuse_types(call, "out", "residual")


def _valid(call: CallShape, config: CutlassConfig) -> str | None:
    # Sums of fp8 products stand in registers twice.
    most = 192 if _fp8(call) else 256
    if config.block_m * config.block_n > 128 * most:
        return f"tiles of {config.block_m} x {config.block_n}, 128 x {most} at most (registers)"
    if config.block_n not in WIDTHS:
        return f"block_n {config.block_n}: one instruction of the tensor cores has {WIDTHS}"
    columns = config.block_n // 2 if sizes(call).gated else config.block_n
    if columns % 32:
        return f"tiles of {columns} columns, multiples of 32 are written"
    if _shared(config) > SHARED:
        return f"{_shared(config)} bytes of shared memory, {SHARED} at most"
    if config.cluster > cdiv(sizes(call).rows, config.block_m):
        return f"clusters of {config.cluster} row tiles, the call has fewer"
    return None


# Rows, weight rows, stages.
TILES = (
    *((128, 128, 4), (128, 128, 6), (128, 256, 3)),
    *((128, 256, 4), (256, 128, 3), (256, 128, 4)),
)
FP8_TILES = (
    *((128, 128, 4), (128, 128, 6), (128, 192, 4)),
    *((128, 192, 5), (256, 96, 4)),
)


def _space(call: CallShape) -> list[CutlassConfig]:
    """Single programs before clusters: what needs least of driver and device is tried first."""
    return [
        CutlassConfig(block_m=m, block_n=n, stages=stages, cluster=cluster, super=width)
        for cluster in (1, 2)
        for m, n, stages in (FP8_TILES if _fp8(call) else TILES)
        for width in (4, 8)
    ]


def _default(call: CallShape) -> CutlassConfig:
    s = sizes(call)
    if s.rows <= 128:
        return CutlassConfig(block_m=128, block_n=128, stages=6)
    if _fp8(call):
        return CutlassConfig(block_m=128, block_n=192, stages=5)
    # Gated, a fourth stage costs a spilled register.
    return CutlassConfig(block_m=128, block_n=256, stages=3 if s.gated else 4)


def _rows_first(call: CallShape) -> bool:
    return _fp8(call) or "norm" in call.shapes or "rows" in call.shapes


def _workspace(call: CallShape, config: CutlassConfig) -> int:
    s = sizes(call)
    if _fp8(call):
        return codes_bytes(s) + scales_bytes(s)
    return cdiv(s.rows * s.k * SIZES["bf16"], 256) * 256 if _rows_first(call) else 0


def _first(call: CallShape, s: Sizes) -> Launch:
    """The launch that makes the rows that are multiplied."""
    if _fp8(call):
        return rows_launch(call, s)
    return launch(
        "linear_tiles.rows_kernel",
        (s.rows, 1, 1),
        live_ptr=pointer(call, "live"),
        x_ptr=pointer(call, "x"),
        norm_ptr=pointer(call, "norm"),
        rows_ptr=pointer(call, "rows"),
        out_ptr=workspace("bf16"),
        LIVE=call.attrs.get("live_index", 0),
        K=s.k,
        EPS=float(call.attrs.get("eps", 0.0)) if "norm" in call.shapes else 0.0,
        BLOCK=min(power(s.k), 4096),
    )


def _launches(call: CallShape, config: CutlassConfig) -> tuple[Launch, ...]:
    s, attrs = sizes(call), call.attrs
    fp8, first = _fp8(call), _rows_first(call)
    x_arg, x_rows = (WORKSPACE, s.rows) if first else ("x", call.shapes["x"][0])
    type, block_k = ("fp8e4nv" if fp8 else "bf16"), SPAN // _size(call)
    halves = s.gated or config.cluster > 1
    box_n = config.block_n // 2 if halves else config.block_n
    columns = config.block_n // 2 if s.gated else config.block_n
    clusters = cdiv(s.rows, config.block_m * config.cluster) * cdiv(s.outputs, columns)
    product = launch(
        "linear_cutlass.linear_kernel",
        (min(clusters, PROCESSORS // config.cluster), 1, 1),
        warps=12,
        stages=config.stages,
        ctas=config.cluster,
        x=Descriptor(
            arg=x_arg,
            type=type,
            shape=(x_rows, s.k),
            strides=(s.k, 1),
            block=(config.block_m, block_k),
        ),
        w=Descriptor(
            arg="w",
            field="data",
            type=type,
            shape=(call.shapes["w"][0], s.k),
            strides=(s.k, 1),
            block=(box_n, block_k),
        ),
        live_ptr=pointer(call, "live"),
        x_scale_ptr=scales_pointer(s) if fp8 else None,
        w_scale_ptr=stored("w", "scale", "fp32") if fp8 else None,
        bias_ptr=pointer(call, "bias"),
        residual_ptr=pointer(call, "residual"),
        residual_rows_ptr=pointer(call, "residual_rows"),
        out_ptr=pointer(call, "out"),
        LIVE=attrs.get("live_index", 0),
        ROWS=s.rows,
        OUTPUTS=s.outputs,
        K=s.k,
        ACT=attrs.get("act", ""),
        GATED=s.gated,
        SCALE=float(attrs["scale"]),
        SOFTCAP=float(attrs["softcap"]),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BOX_N=box_n,
        SUPER=config.super,
        SHARED=_shared(config),
        FP8=fp8,
    )
    assert product.source is not None
    made = (_first(call, s),) if first else ()
    return (*made, replace(product, source=replace(product.source, language="cuda")))


register(
    CudaKernel(
        name="linear_cutlass",
        op="linear",
        accepts=_accepts,
        space=_space,
        default=_default,
        valid=_valid,
        launches=_launches,
        workspace=_workspace,
        tuned_only=True,
    )
)
