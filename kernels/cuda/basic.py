"""Registration of the row-wise CUDA kernels. Imported by kernels/cuda/register.py."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cuda.kernel import Config, CudaKernel, launch, pointer, register
from kernels.kernel import CallShape
from kernels.launch import Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class RowConfig(Config):
    block: int
    warps: int


def _space(call: CallShape) -> list[RowConfig]:
    return [RowConfig(block=b, warps=w) for b in (1024, 2048, 4096) for w in (4, 8)]


def _add(call: CallShape, config: RowConfig) -> tuple[Launch, ...]:
    rows, width = call.shapes["out"]
    return (
        launch(
            "basic.add_kernel",
            (rows, 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            a_ptr=pointer(call, "a"),
            b_ptr=pointer(call, "b"),
            out_ptr=pointer(call, "out"),
            WIDTH=width,
            BLOCK=config.block,
        ),
    )


register(
    CudaKernel(
        name="add",
        op="add",
        accepts=lambda call: None,
        space=_space,
        default=lambda call: RowConfig(block=1024, warps=4),
        launches=_add,
    )
)
