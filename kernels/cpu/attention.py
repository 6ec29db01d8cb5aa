"""Registration of the CPU attention kernels, one per KV dtype; the algorithm stands in
attention.cpp.

Imported by kernels/cpu/register.py.
"""

from __future__ import annotations

from kernels.cpu.rope import KV_SUFFIXES, PAGE_SIZE, accepts_pages, page_scalars
from kernels.kernel import CallShape, Kernel, register

BLOCK = 128  # keys of a block, as in attention.cpp
# Sequences of full length whose blocks can be shared out; more of them fill the threads anyway.
SPLIT_SEQS = 8


def _room(call: CallShape) -> int:
    """Partial results (one per query head and key block) that fit the workspace."""
    seqs, pages = call.shapes["pages"]
    blocks = -(-pages * PAGE_SIZE // BLOCK)
    return min(seqs, SPLIT_SEQS) * blocks * call.attrs["heads"] if blocks > 1 else 0


def _scalars(call: CallShape) -> dict[str, int | float]:
    return page_scalars(call) | {
        "heads": call.attrs["heads"],
        "causal": int(call.attrs["causal"]),
        "window": call.attrs["window"],
        "logn": call.attrs["logn"],
        "columns": call.shapes["pages"][1],
        "room": _room(call),
        "scale": float(call.attrs["scale"]),
        "softcap": float(call.attrs["softcap"]),
    }


for _dtype, _suffix in KV_SUFFIXES.items():
    register(
        Kernel(
            name=f"attention_{_suffix}",
            op="attention",
            target="cpu",
            entry=f"hs_attention_{_suffix}",
            params=(
                "ptr:live",
                "ptr:q",
                "ptr:kv",
                "ptr:seq_start",
                "ptr:seq_len",
                "ptr:pages",
                "ptr:sinks",
                "ptr:alibi",
                "ptr:out",
                "ptr:workspace",
                "i64:layer_offset",
                "i64:page_bytes",
                "i64:heads",
                "i64:kv_heads",
                "i64:head_dim",
                "i64:v_head_dim",
                "i64:causal",
                "i64:window",
                "i64:logn",
                "i64:columns",
                "i64:room",
                "f64:scale",
                "f64:softcap",
            ),
            accepts=accepts_pages(_dtype),
            scalars=_scalars,
            workspace=lambda call: _room(call) * (call.attrs["v_head_dim"] + 2) * 4,
        )
    )
