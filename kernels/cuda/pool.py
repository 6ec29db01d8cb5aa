"""Registration of the CUDA kernel of pooling. Imported by kernels/cuda/register.py."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cuda.kernel import Config, CudaKernel, launch, pointer, register
from kernels.cuda.rows import power, refuse_types
from kernels.kernel import CallShape
from kernels.launch import Launch

POOLINGS = ("last", "cls", "mean")
WIDEST = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig(Config):
    """`rows`: tokens a mean reads at a time."""

    rows: int
    warps: int


def _accepts(call: CallShape) -> str | None:
    width, pooling = call.shapes["x"][1], call.attrs["pooling"]
    if pooling not in POOLINGS:
        return f"pooling {pooling!r} is unknown: supported are {', '.join(POOLINGS)}"
    if width > WIDEST:
        return f"rows of {width} are wider than {WIDEST}"
    return refuse_types(call, "x")


def _valid(call: CallShape, config: PoolConfig) -> str | None:
    each = power(call.shapes["x"][1]) * config.rows // (32 * config.warps)
    return f"{each} values per thread" if each > 64 else None


def _default(call: CallShape) -> PoolConfig:
    size = power(call.shapes["x"][1])
    warps = min(16, max(1, size // 256))
    return PoolConfig(rows=max(1, min(8, 32 * warps * 32 // size)), warps=warps)


def _launches(call: CallShape, config: PoolConfig) -> tuple[Launch, ...]:
    seqs, width = call.shapes["embedding"]
    return (
        launch(
            "pool.pool_kernel",
            (seqs, 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            x_ptr=pointer(call, "x"),
            start_ptr=pointer(call, "seq_start"),
            out_ptr=pointer(call, "embedding"),
            status_ptr=pointer(call, "status"),
            POOLING=call.attrs["pooling"],
            NORMALISE=bool(call.attrs["normalise"]),
            WIDTH=width,
            BLOCK=power(width),
            ROWS=config.rows,
        ),
    )


register(
    CudaKernel(
        name="pool",
        op="pool",
        accepts=_accepts,
        space=lambda call: [
            PoolConfig(rows=r, warps=w) for r in (1, 2, 4, 8) for w in (2, 4, 8, 16)
        ],
        valid=_valid,
        default=_default,
        launches=_launches,
    )
)
