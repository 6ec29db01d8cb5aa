"""Registration of the CPU kernels of mla.cpp: the write of latents, attention over them (one per KV
dtype) and the linear of every head (one per storage format).

Imported by kernels/cpu/register.py.
"""

from __future__ import annotations

from collections.abc import Callable

from kernels.cpu.basic import not_float32
from kernels.cpu.layout import SUFFIXES, misfit, parse_format
from kernels.cpu.rope import KV_SUFFIXES, PAGE_SIZE
from kernels.kernel import CallShape, Kernel, register

# As in mla.cpp.
BLOCK = 256
MAX_LATENT, MAX_WIDTH = 512, 576
# Bytes of partial results: enough to share out the blocks of a few long sequences; more of them
# fill the threads anyway.
PARTIAL_BYTES = 64 << 20
SPLIT_SEQS = 8


def _accepts_pages(kv_dtype: str) -> Callable[[CallShape], str | None]:
    def accepts(call: CallShape) -> str | None:
        attrs = call.attrs
        if attrs["kv_dtype"] != kv_dtype:
            return f"the KV pool is {attrs['kv_dtype']}, this kernel reads {kv_dtype}"
        if attrs["page_size"] != PAGE_SIZE:
            return f"page_size {attrs['page_size']} is not {PAGE_SIZE}"
        latent, width = attrs["latent"], attrs["latent"] + attrs["rotary"]
        if latent % 16 or latent > MAX_LATENT or width > MAX_WIDTH:
            return (
                f"latent {latent} + {attrs['rotary']} is not a multiple of 16 up to {MAX_LATENT}, "
                f"{MAX_WIDTH} together"
            )
        return not_float32(call)

    return accepts


def _page_scalars(call: CallShape) -> dict[str, int | float]:
    return {n: int(call.attrs[n]) for n in ("layer_offset", "page_bytes", "latent", "rotary")}


def _room(call: CallShape) -> int:
    """Partial results (one per query head and key block) that fit the workspace."""
    seqs, pages = call.shapes["pages"]
    blocks = -(-pages * PAGE_SIZE // BLOCK)
    wanted = min(seqs, SPLIT_SEQS) * blocks * call.attrs["heads"] if blocks > 1 else 0
    return min(wanted, PARTIAL_BYTES // _partial_bytes(call))


def _partial_bytes(call: CallShape) -> int:
    return int(call.attrs["latent"] + 2) * 4


for _dtype, _suffix in KV_SUFFIXES.items():
    register(
        Kernel(
            name=f"mla_kv_write_{_suffix}",
            op="mla_kv_write",
            target="cpu",
            entry=f"hs_mla_kv_write_{_suffix}",
            params=(
                "ptr:live",
                "ptr:x",
                "ptr:norm",
                "ptr:table",
                "ptr:kv_slots",
                "ptr:kv",
                "i64:layer_offset",
                "i64:page_bytes",
                "i64:latent",
                "i64:rotary",
                "i64:interleaved",
                "f64:eps",
            ),
            accepts=_accepts_pages(_dtype),
            scalars=lambda call: {
                **_page_scalars(call),
                "interleaved": int(call.attrs["interleaved"]),
                "eps": float(call.attrs["eps"]),
            },
        )
    )
    register(
        Kernel(
            name=f"mla_attention_{_suffix}",
            op="mla_attention",
            target="cpu",
            entry=f"hs_mla_attention_{_suffix}",
            params=(
                "ptr:live",
                "ptr:q",
                "ptr:kv",
                "ptr:seq_start",
                "ptr:seq_len",
                "ptr:pages",
                "ptr:out",
                "ptr:workspace",
                "i64:layer_offset",
                "i64:page_bytes",
                "i64:heads",
                "i64:latent",
                "i64:rotary",
                "i64:columns",
                "i64:room",
                "f64:scale",
            ),
            accepts=_accepts_pages(_dtype),
            scalars=lambda call: {
                **_page_scalars(call),
                "heads": call.attrs["heads"],
                "columns": call.shapes["pages"][1],
                "room": _room(call),
                "scale": float(call.attrs["scale"]),
            },
            workspace=lambda call: _room(call) * _partial_bytes(call),
        )
    )


def _accepts_weight(kind: str) -> Callable[[CallShape], str | None]:
    def accepts(call: CallShape) -> str | None:
        return misfit(call.formats["w"], kind, call.shapes["w"][2]) or not_float32(call)

    return accepts


for _kind, _suffix in SUFFIXES.items():
    register(
        Kernel(
            name=f"head_linear_{_suffix}",
            op="head_linear",
            target="cpu",
            entry=f"hs_head_linear_{_suffix}",
            params=(
                "ptr:live",
                "ptr:x",
                "ptr:table",
                "ptr:out",
                "i64:heads",
                "i64:k",
                "i64:n",
                "i64:rotary",
                "i64:interleaved",
                "ptr:w.data",
                *(("i64:group", "ptr:w.scale") if _kind.startswith("int") else ()),
            ),
            accepts=_accepts_weight(_kind),
            scalars=lambda call: {
                "heads": call.attrs["heads"],
                "k": call.shapes["w"][2],
                "n": call.shapes["w"][1],
                "rotary": call.shapes["table"][1] if "table" in call.shapes else 0,
                "interleaved": int(call.attrs["interleaved"]),
                **({"group": group} if (group := parse_format(call.formats["w"])[1]) else {}),
            },
        )
    )
