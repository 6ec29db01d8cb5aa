"""Registration of the CUTLASS kernel of `linear` for many rows: candidates of the tuner beside the
Triton tiles of kernels/cuda/linear.py. Imported by kernels/cuda/register.py.

A product of many rows is bound by the tensor cores, and those are fed best by a persistent kernel
with warps of its own for the loads, which Triton cannot express on every version we support. It is
CUDA C++ on the CuTe headers of `nvidia-cutlass`, built by nvcc, not CuTe DSL: the headers are under
BSD-3 (the DSL's licence is proprietary and forbids standing in for its host library), and the
parameters are ours (two tensor maps and pointers, which the runtime writes as it writes Triton's),
where the DSL computes some of its kernels' parameters on the host.

A norm and a choice of rows run as a first launch, as with large Triton tiles. Never chosen by the
heuristic: the tuner compares it with the reference on the device before it is timed. Without nvcc
the kernel refuses every call, with the remedy as the reason.
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
    workspace,
)
from kernels.cuda.linear import SHARED, sizes
from kernels.cuda.rows import PROCESSORS, power, refuse_types
from kernels.kernel import CallShape
from kernels.launch import WORKSPACE, Descriptor, Launch

LEAST_ROWS = 65  # fewer fill half a tile at most
BLOCK_K = 64  # 128 bytes, the swizzle's span


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


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _shared(config: CutlassConfig) -> int:
    """Bytes: the ring of tiles, its barriers, and 2 KiB to align both."""
    return config.stages * ((config.block_m + config.block_n) * BLOCK_K * 2 + 16) + 2048


def _accepts(call: CallShape) -> str | None:
    s = sizes(call)
    if reason := nvcc.missing():
        return reason
    if call.dtypes["x"] != "bfloat16" or call.formats["w"] != "bfloat16":
        return f"x is {call.dtypes['x']}, w {call.formats['w']}: both must be bfloat16"
    if s.rows < LEAST_ROWS:
        return f"{s.rows} rows, {LEAST_ROWS} at least"
    if s.k % 8 or s.outputs % 8:
        return f"K {s.k} and outputs {s.outputs} must be multiples of 8"
    return refuse_types(call, "out", "residual")


def _valid(call: CallShape, config: CutlassConfig) -> str | None:
    if config.block_m * config.block_n > 128 * 256:
        return f"tiles of {config.block_m} x {config.block_n}, 128 x 256 at most (registers)"
    if _shared(config) > SHARED:
        return f"{_shared(config)} bytes of shared memory, {SHARED} at most"
    if config.cluster > _ceil(sizes(call).rows, config.block_m):
        return f"clusters of {config.cluster} row tiles, the call has fewer"
    return None


def _space(call: CallShape) -> list[CutlassConfig]:
    return [
        CutlassConfig(block_m=m, block_n=n, stages=stages, cluster=cluster, super=width)
        for m, n, stages in (
            (128, 128, 4),
            (128, 128, 6),
            (128, 256, 3),
            (128, 256, 4),
            (256, 128, 3),
            (256, 128, 4),
        )
        for cluster in (1, 2)
        for width in (4, 8)
    ]


def _default(call: CallShape) -> CutlassConfig:
    rows = sizes(call).rows
    if rows <= 128:
        return CutlassConfig(block_m=128, block_n=128, stages=6)
    return CutlassConfig(block_m=128, block_n=256, stages=4, cluster=2)


def _rows_first(call: CallShape) -> bool:
    return "norm" in call.shapes or "rows" in call.shapes


def _workspace(call: CallShape, config: CutlassConfig) -> int:
    s = sizes(call)
    return _ceil(s.rows * s.k * SIZES["bf16"], 256) * 256 if _rows_first(call) else 0


def _launches(call: CallShape, config: CutlassConfig) -> tuple[Launch, ...]:
    s, attrs = sizes(call), call.attrs
    live, row = pointer(call, "live"), attrs.get("live_index", 0)
    launches: tuple[Launch, ...] = ()
    x_arg, x_rows = "x", call.shapes["x"][0]
    if _rows_first(call):
        launches = (
            launch(
                "linear.rows_kernel",
                (s.rows, 1, 1),
                live_ptr=live,
                x_ptr=pointer(call, "x"),
                norm_ptr=pointer(call, "norm"),
                rows_ptr=pointer(call, "rows"),
                out_ptr=workspace("bf16"),
                LIVE=row,
                K=s.k,
                EPS=float(attrs.get("eps", 0.0)) if "norm" in call.shapes else 0.0,
                BLOCK=min(power(s.k), 4096),
            ),
        )
        x_arg, x_rows = WORKSPACE, s.rows
    halves = s.gated or config.cluster > 1
    box_n = config.block_n // 2 if halves else config.block_n
    columns = config.block_n // 2 if s.gated else config.block_n
    clusters = _ceil(s.rows, config.block_m * config.cluster) * _ceil(s.outputs, columns)
    product = launch(
        "linear_cutlass.linear_kernel",
        (min(clusters, PROCESSORS // config.cluster), 1, 1),
        warps=12,
        stages=config.stages,
        ctas=config.cluster,
        x=Descriptor(
            arg=x_arg,
            type="bf16",
            shape=(x_rows, s.k),
            strides=(s.k, 1),
            block=(config.block_m, BLOCK_K),
        ),
        w=Descriptor(
            arg="w",
            field="data",
            type="bf16",
            shape=(call.shapes["w"][0], s.k),
            strides=(s.k, 1),
            block=(box_n, BLOCK_K),
        ),
        live_ptr=live,
        bias_ptr=pointer(call, "bias"),
        residual_ptr=pointer(call, "residual"),
        residual_rows_ptr=pointer(call, "residual_rows"),
        out_ptr=pointer(call, "out"),
        LIVE=row,
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
    )
    assert product.source is not None
    return (*launches, replace(product, source=replace(product.source, language="cuda")))


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
