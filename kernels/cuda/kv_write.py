"""Registration of the CUDA kernels that write keys and values into pages. Imported by
kernels/cuda/register.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kernels.cuda.kernel import SIZES, CudaKernel, launch, pointer, register
from kernels.cuda.rows import (
    TileConfig,
    power,
    refuse_types,
    tile_default,
    tile_space,
    tile_valid,
)
from kernels.kernel import CallShape
from kernels.launch import Launch, Pointer

# Element types of pages, as Triton spells them.
KV_TYPES = {"bfloat16": "bf16", "float32": "fp32", "fp8_e4m3": "fp8e4nv", "fp8_e5m2": "fp8e5"}


def kv_pointer(attrs: Mapping[str, Any]) -> Pointer:
    """The call's layer in page 0. The offset of the layer is in the address, so that equal layers
    share a binary."""
    return Pointer(arg="kv", offset=attrs["layer_offset"], type=KV_TYPES[attrs["kv_dtype"]])


def kv_stride(attrs: Mapping[str, Any]) -> int:
    """Elements from page to page."""
    return int(attrs["page_bytes"]) // SIZES[KV_TYPES[attrs["kv_dtype"]]]


def refuse_pages(attrs: Mapping[str, Any]) -> str | None:
    """Why pages of this kind cannot be served, or None."""
    if attrs["kv_dtype"] not in KV_TYPES:
        return f"the KV pool is {attrs['kv_dtype']}: supported are {', '.join(KV_TYPES)}"
    for name in ("layer_offset", "page_bytes"):
        if attrs[name] % 16:
            return f"{name} {attrs[name]} is not a multiple of 16 bytes"
    return None


def _refuse_sizes(call: CallShape) -> str | None:
    dim, v_dim = call.attrs.get("head_dim"), call.attrs.get("v_head_dim")
    if call.op == "rope_kv" and v_dim != dim:
        return f"v_head_dim {v_dim} is not head_dim {dim}: heads of qkv have one size"
    return None


def _kv_heads(call: CallShape) -> tuple[int, int]:
    attrs = call.attrs
    return call.shapes["k"][0] * attrs["kv_heads"], max(attrs["head_dim"], attrs["v_head_dim"])


def _all_heads(call: CallShape) -> tuple[int, int]:
    heads = call.attrs["heads"] + 2 * call.attrs["kv_heads"]
    return call.shapes["qkv"][0] * heads, call.attrs["head_dim"]


def _latents(call: CallShape) -> tuple[int, int]:
    return call.shapes["x"][0], call.attrs["latent"]


def _kv_write(call: CallShape, config: TileConfig) -> tuple[Launch, ...]:
    units, _ = _kv_heads(call)
    dim, v_dim = call.attrs["head_dim"], call.attrs["v_head_dim"]
    shared = call.shapes["k_shared"][1] if "k_shared" in call.shapes else 0
    return (
        launch(
            "kv_write.kv_write_kernel",
            (-(-units // config.rows), 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            k_ptr=pointer(call, "k"),
            v_ptr=pointer(call, "v"),
            shared_ptr=pointer(call, "k_shared"),
            slots_ptr=pointer(call, "kv_slots"),
            kv_ptr=kv_pointer(call.attrs),
            KV_HEADS=call.attrs["kv_heads"],
            OWN=dim - shared,
            SHARED=shared,
            V_DIM=v_dim,
            PAGE=call.attrs["page_size"],
            STRIDE=kv_stride(call.attrs),
            ROWS=config.rows,
            BLOCK=power(max(dim - shared, v_dim)),
            SHARED_BLOCK=power(shared),
        ),
    )


def rotary_dims(call: CallShape) -> int:
    return call.shapes["table"][1] if "table" in call.shapes else 0


def heads_arguments(call: CallShape) -> dict[str, Any]:
    """Arguments of every kernel that norms, turns and stores projected heads, but the norms' eps
    (which has two names)."""
    attrs, dim = call.attrs, call.attrs["head_dim"]
    return {
        "table_ptr": pointer(call, "table"),
        "q_norm_ptr": pointer(call, "q_norm"),
        "k_norm_ptr": pointer(call, "k_norm"),
        "slots_ptr": pointer(call, "kv_slots"),
        "kv_ptr": kv_pointer(attrs),
        "q_ptr": pointer(call, "q"),
        "CENTRE": bool(attrs["centre"]),
        "OWN": any(call.shapes.get(name, (0,))[0] > dim for name in ("q_norm", "k_norm")),
        "CLIP": float(attrs["clip"]),
        "INTERLEAVED": bool(attrs["interleaved"]),
        "HEADS": attrs["heads"],
        "KV_HEADS": attrs["kv_heads"],
        "DIM": dim,
        "ROTARY": rotary_dims(call),
        "PAGE": attrs["page_size"],
        "STRIDE": kv_stride(attrs),
    }


def head_blocks(call: CallShape) -> dict[str, int]:
    """Sizes of the tiles a head is loaded as: pairs, and what is not turned."""
    rotary = rotary_dims(call)
    return {"PAIRS": power(rotary // 2), "REST": power(call.attrs["head_dim"] - rotary)}


def _rope_kv(call: CallShape, config: TileConfig) -> tuple[Launch, ...]:
    units, _ = _all_heads(call)
    return (
        launch(
            "kv_write.rope_kv_kernel",
            (-(-units // config.rows), 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            qkv_ptr=pointer(call, "qkv"),
            EPS=float(call.attrs["eps"]),
            ROWS=config.rows,
            **head_blocks(call),
            **heads_arguments(call),
        ),
    )


def _mla_kv_write(call: CallShape, config: TileConfig) -> tuple[Launch, ...]:
    tokens, latent = _latents(call)
    attrs = call.attrs
    return (
        launch(
            "kv_write.mla_kv_write_kernel",
            (-(-tokens // config.rows), 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            x_ptr=pointer(call, "x"),
            norm_ptr=pointer(call, "norm"),
            table_ptr=pointer(call, "table"),
            slots_ptr=pointer(call, "kv_slots"),
            kv_ptr=kv_pointer(attrs),
            EPS=float(attrs["eps"]),
            INTERLEAVED=bool(attrs["interleaved"]),
            LATENT=latent,
            ROTARY=attrs["rotary"],
            PAGE=attrs["page_size"],
            STRIDE=kv_stride(attrs),
            ROWS=config.rows,
            BLOCK=power(latent),
            PAIRS=power(attrs["rotary"] // 2),
        ),
    )


Units = Callable[[CallShape], tuple[int, int]]


def _register(
    op: str,
    names: tuple[str, ...],
    units: Units,
    launches: Callable[[CallShape, TileConfig], tuple[Launch, ...]],
) -> CudaKernel:
    """`names`: arguments of the activations' type; `units`: how many tiles' rows, how wide."""
    return register(
        CudaKernel(
            name=op,
            op=op,
            accepts=lambda call: (
                _refuse_sizes(call) or refuse_pages(call.attrs) or refuse_types(call, *names)
            ),
            space=tile_space,
            valid=lambda call, config: tile_valid(units(call)[1], config),
            default=lambda call: tile_default(*units(call)),
            launches=launches,
        )
    )


_register("kv_write", ("k", "v", "k_shared"), _kv_heads, _kv_write)
ROPE_KV = _register("rope_kv", ("qkv", "q_norm", "k_norm", "q"), _all_heads, _rope_kv)
_register("mla_kv_write", ("x", "norm"), _latents, _mla_kv_write)
