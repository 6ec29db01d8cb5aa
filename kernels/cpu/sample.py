"""Registration of the CPU kernels of sample.cpp: state edits and sampling.

Imported by kernels/cpu/register.py.
"""

from __future__ import annotations

from kernels.cpu.basic import not_float32
from kernels.kernel import CallShape, Kernel, register

BLOCK = 4096  # vocabulary entries of a block, as in sample.cpp
PARTIAL_BYTES = 32  # sizeof(Partial)

_ARGS = (
    "live",
    "logits",
    "row_token",
    "row_slot",
    "row_target",
    "row_flags",
    "row_top",
    "row_mask",
    "masks",
    "top_k",
    "temperature",
    "top_p",
    "min_p",
    "frequency",
    "presence",
    "repetition",
    "seed",
    "positions",
    "counts",
    "bias",
    "last_token",
    "token",
    "logprob",
    "top_ids",
    "top_logprobs",
    "status",
    "workspace",
)


def _accepts(call: CallShape) -> str | None:
    vocab, columns = call.attrs["vocab"], call.shapes["logits"][1]
    if not 1 <= vocab <= min(columns, call.shapes["counts"][1]):
        state = call.shapes["counts"][1]
        return f"vocab {vocab} is not within {columns} logit columns and {state} state columns"
    if (words := call.shapes["masks"][1]) != -(-vocab // 32):
        return f"masks of {words} words do not hold vocab {vocab}"
    return not_float32(call)


register(
    Kernel(
        name="sample",
        op="sample",
        target="cpu",
        entry="hs_sample",
        params=(*(f"ptr:{a}" for a in _ARGS), "i64:columns", "i64:vocab", "i64:state_columns"),
        accepts=_accepts,
        scalars=lambda call: {
            "columns": call.shapes["logits"][1],
            "vocab": call.attrs["vocab"],
            "state_columns": call.shapes["counts"][1],
        },
        workspace=lambda call: (
            call.shapes["logits"][0] * -(-call.attrs["vocab"] // BLOCK) * PARTIAL_BYTES
        ),
    )
)

register(
    Kernel(
        name="edit",
        op="edit",
        target="cpu",
        entry="hs_edit",
        params=("ptr:live", "ptr:edits", "ptr:counts", "ptr:bias", "i64:columns"),
        accepts=lambda call: None,
        scalars=lambda call: {"columns": call.shapes["counts"][1]},
    )
)
