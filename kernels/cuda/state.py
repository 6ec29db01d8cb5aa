"""Registration of the CUDA kernel of state edits. Imported by kernels/cuda/register.py."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cuda.kernel import Config, CudaKernel, launch, pointer, register
from kernels.kernel import CallShape
from kernels.launch import Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class EditConfig(Config):
    """`block`: vocabulary columns of a program; `tile`: edits it looks at together."""

    block: int
    tile: int
    warps: int


def _launches(call: CallShape, config: EditConfig) -> tuple[Launch, ...]:
    vocab = call.shapes["counts"][1]
    return (
        launch(
            "state.edit_kernel",
            (-(-vocab // config.block), 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            edits_ptr=pointer(call, "edits"),
            counts_ptr=pointer(call, "counts"),
            bias_ptr=pointer(call, "bias"),
            VOCAB=vocab,
            BLOCK=config.block,
            TILE=config.tile,
        ),
    )


register(
    CudaKernel(
        name="edit",
        op="edit",
        accepts=lambda call: None,
        space=lambda call: [
            EditConfig(block=b, tile=t, warps=w)
            for b in (512, 1024, 2048)
            for t in (64, 128, 256)
            for w in (4, 8)
        ],
        # A step without edits, the usual one, costs an empty launch whatever is chosen here.
        default=lambda call: EditConfig(block=1024, tile=64, warps=8),
        launches=_launches,
    )
)
