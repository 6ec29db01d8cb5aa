"""Registration of the CUDA kernel of `head_linear`, the per-head products of latent attention
(`mla_attention` is in attention.py, `mla_kv_write` in kv_write.py). Imported by
kernels/cuda/register.py.

Few rows are a stream of weights (of DeepSeek-V3 16 MiB per call): a program per tile of a head's
outputs, thousands of them, whose first weights travel before the previous kernel has ended. Many
rows are tensor-core tiles. Either way the rotated dims ride along, so the call is one launch.
"""

from __future__ import annotations

from kernels.cuda.kernel import CudaKernel, launch, pointer, register, stored
from kernels.cuda.product import TileConfig, fetches_ahead, half, weight_of, weight_slot
from kernels.cuda.rows import cdiv, power, refuse_types
from kernels.cuda.stack import stack_default, stack_reason, stack_space
from kernels.kernel import CallShape
from kernels.launch import Launch


def _accepts(call: CallShape) -> str | None:
    if "table" in call.shapes and call.shapes["table"][1] % 2:
        return f"{call.shapes['table'][1]} rotated dims: pairs are rotated, an even number of dims"
    return refuse_types(call, "x", "out")


def _valid(call: CallShape, config: TileConfig) -> str | None:
    _, n, k = call.shapes["w"]
    return stack_reason(call, config, outputs=n, k=k)


def _default(call: CallShape) -> TileConfig:
    _, n, k = call.shapes["w"]
    return stack_default(call, rows=call.shapes["x"][0], outputs=n, k=k)


def _launches(call: CallShape, config: TileConfig) -> tuple[Launch, ...]:
    heads, n, k = call.shapes["w"]
    w = weight_of(call)
    rotary = call.shapes["table"][1] if "table" in call.shapes else 0
    scaled = w.bits or w.row_scale
    row_tiles = cdiv(call.shapes["x"][0], config.block_m)
    ahead = row_tiles == 1 and fetches_ahead(k, w, config.block_k)
    return (
        launch(
            "mla.head_linear_kernel",
            (row_tiles, cdiv(n, config.block_n) * heads, 1),
            warps=config.warps,
            stages=config.stages,
            live_ptr=pointer(call, "live"),
            x_ptr=pointer(call, "x"),
            w=weight_slot("w", w, heads * n, k, config),
            w_ptr=stored("w", "data", w.type) if ahead else None,
            scale_ptr=stored("w", "scale", "fp16" if w.bits else "fp32") if scaled else None,
            table_ptr=pointer(call, "table"),
            out_ptr=pointer(call, "out"),
            HEADS=heads,
            OUTPUTS=n,
            K=k,
            ROTARY=rotary,
            INTERLEAVED=bool(call.attrs["interleaved"]),
            ROW_BYTES=int(k * w.row_bytes),
            BITS=w.bits,
            GROUP=w.group,
            W_TMA=config.tma,
            HALF=half(call),
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            PAIRS=power(rotary // 2),
            STAGES=config.stages,
        ),
    )


register(
    CudaKernel(
        name="head_linear",
        op="head_linear",
        accepts=_accepts,
        space=lambda call: stack_space(call, _default(call)),
        default=_default,
        valid=_valid,
        launches=_launches,
    )
)
