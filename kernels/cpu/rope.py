"""Registration of the CPU kernels of rope.cpp: the angle table, the rotation, the KV write and both
in one pass (linear_rope_kv.py: with the product before them).

Imported by kernels/cpu/register.py.
"""

from __future__ import annotations

from collections.abc import Callable

from kernels.cpu.basic import not_float32, refuse_amax
from kernels.kernel import CallShape, Kernel, register

PAGE_SIZE = 16  # PAGE in kv_page.h
MAX_HEAD_DIM = 256  # MAX_DIM in kv_page.h
# In the order of KvDtype in kv_page.h.
KV_SUFFIXES = {"float32": "f32", "bfloat16": "bf16", "fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}
# HeadSlot in rope.cpp.
HEAD_PARAMS = (
    "ptr:live",
    "ptr:table",
    "ptr:q_norm",
    "ptr:k_norm",
    "ptr:kv_slots",
    "ptr:kv",
    "ptr:q",
    "i64:layer_offset",
    "i64:page_bytes",
    "i64:heads",
    "i64:kv_heads",
    "i64:head_dim",
    "i64:rotary",
    "i64:interleaved",
    "i64:own",
    "i64:centre",
    "f64:head_eps",
    "f64:clip",
    "i64:kv_dtype",
)


def refuse_pages(call: CallShape, kv_dtype: str) -> str | None:
    """Why a kernel for pages of `kv_dtype` cannot serve a call on the KV pool, or None."""
    attrs = call.attrs
    if attrs["kv_dtype"] != kv_dtype:
        return f"the KV pool is {attrs['kv_dtype']}, this kernel reads {kv_dtype}"
    if attrs["page_size"] != PAGE_SIZE:
        return f"page_size {attrs['page_size']} is not {PAGE_SIZE}"
    for name in ("head_dim", "v_head_dim"):
        dim = attrs[name]
        if dim % 16 or not 16 <= dim <= MAX_HEAD_DIM:
            return f"{name} {dim} is not a multiple of 16 in 16..{MAX_HEAD_DIM}"
    if "heads" in attrs and attrs["heads"] % attrs["kv_heads"]:
        return (
            f"{attrs['heads']} heads cannot be shared out evenly over {attrs['kv_heads']} kv heads"
        )
    return refuse_amax(call) or not_float32(call)


def refuse_heads(call: CallShape) -> str | None:
    """Why the heads of merged qkv rows cannot go into the KV pool, or None."""
    kv_dtype, dim, v_dim = (call.attrs[name] for name in ("kv_dtype", "head_dim", "v_head_dim"))
    if kv_dtype not in KV_SUFFIXES:
        return f"the KV pool is {kv_dtype}, pages hold one of {', '.join(KV_SUFFIXES)}"
    if v_dim != dim:
        return f"v_head_dim {v_dim} is not head_dim {dim}: heads of qkv have one size"
    return refuse_pages(call, kv_dtype)


def accepts_pages(kv_dtype: str) -> Callable[[CallShape], str | None]:
    return lambda call: refuse_pages(call, kv_dtype)


def page_scalars(call: CallShape) -> dict[str, int | float]:
    names = ("layer_offset", "page_bytes", "kv_heads", "head_dim", "v_head_dim")
    return {name: int(call.attrs[name]) for name in names}


def _rope_scalars(call: CallShape) -> dict[str, int | float]:
    return {
        "heads": call.attrs["heads"],
        "head_dim": call.attrs["head_dim"],
        "start": call.attrs.get("start", 0),
        "rotary": call.shapes["table"][1] if "table" in call.shapes else 0,
        "interleaved": int(call.attrs["interleaved"]),
    }


def head_scalars(call: CallShape) -> dict[str, int | float]:
    """Of HEAD_PARAMS."""
    attrs = call.attrs
    own = call.shapes.get("q_norm", (0,))[0] == attrs["heads"] * attrs["head_dim"]
    return (
        page_scalars(call)
        | _rope_scalars(call)
        | {
            "own": attrs["head_dim"] if own else 0,
            "centre": int(attrs["centre"]),
            "head_eps": float(attrs.get("head_eps", attrs["eps"])),
            "clip": float(attrs["clip"]),
            "kv_dtype": list(KV_SUFFIXES).index(attrs["kv_dtype"]),
        }
    )


register(
    Kernel(
        name="rope_table",
        op="rope_table",
        target="cpu",
        entry="hs_rope_table",
        params=(
            "ptr:live",
            "ptr:positions",
            "ptr:inv_freq",
            "ptr:variant",
            "ptr:out",
            "i64:half",
            "f64:scale",
        ),
        accepts=not_float32,
        scalars=lambda call: {
            "half": call.shapes["out"][1] // 2,
            "scale": float(call.attrs["scale"]),
        },
    )
)

register(
    Kernel(
        name="rope",
        op="rope",
        target="cpu",
        entry="hs_rope",
        params=(
            "ptr:live",
            "ptr:x",
            "ptr:table",
            "ptr:out",
            "i64:heads",
            "i64:head_dim",
            "i64:start",
            "i64:rotary",
            "i64:interleaved",
        ),
        accepts=not_float32,
        scalars=_rope_scalars,
    )
)

for _dtype, _suffix in KV_SUFFIXES.items():
    register(
        Kernel(
            name=f"kv_write_{_suffix}",
            op="kv_write",
            target="cpu",
            entry=f"hs_kv_write_{_suffix}",
            params=(
                "ptr:live",
                "ptr:k",
                "ptr:v",
                "ptr:k_shared",
                "ptr:kv_slots",
                "ptr:kv",
                "i64:layer_offset",
                "i64:page_bytes",
                "i64:kv_heads",
                "i64:head_dim",
                "i64:v_head_dim",
                "i64:shared",
            ),
            accepts=accepts_pages(_dtype),
            scalars=lambda call: {
                **page_scalars(call),
                "shared": call.shapes["k_shared"][1] if "k_shared" in call.shapes else 0,
            },
        )
    )

register(
    Kernel(
        name="rope_kv",
        op="rope_kv",
        target="cpu",
        entry="hs_rope_kv",
        params=(*HEAD_PARAMS, "ptr:qkv"),
        accepts=refuse_heads,
        scalars=head_scalars,
    )
)
