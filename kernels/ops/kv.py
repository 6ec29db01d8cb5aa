"""The KV cache as references see it: one tensor per layer. In a page lie the keys [kv head, token
of page, key dim], then the values [kv head, token of page, value dim]; for latent attention [token
of page, latent + rotary].

Kernels keep the same values in their own page layout (kernels/cpu/kv_page.h); tests convert
between the two. A value becomes what a page keeps in one place, `stored`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
KV_ATTRS: dict[str, type] = {
    "kv_heads": int,
    "head_dim": int,
    "v_head_dim": int,
    "page_size": int,
    "layer_offset": int,
    "page_bytes": int,
    "kv_dtype": str,
}
# Latent attention stores one row per token for all heads: a latent, then a rotated key.
LATENT_ATTRS: dict[str, type] = {
    "latent": int,
    "rotary": int,
    "page_size": int,
    "layer_offset": int,
    "page_bytes": int,
    "kv_dtype": str,
}


def stored(x: Tensor, kv_dtype: str) -> Tensor:
    """x as pages keep it: to nearest even. fp8 has no scale: beyond its largest finite value (448,
    57344), infinity included, it saturates. NaN stays NaN."""
    dtype = KV_DTYPES[kv_dtype]
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype)


def page_shape(attrs: dict[str, Any]) -> tuple[int, ...]:
    """One layer of one page, in elements."""
    if "latent" in attrs:
        return attrs["page_size"], attrs["latent"] + attrs["rotary"]
    return (attrs["kv_heads"] * attrs["page_size"] * (attrs["head_dim"] + attrs["v_head_dim"]),)


class KvState:
    """Layers appear when first used, filled with NaN: a key or value read before it was written
    shows."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.layers: dict[int, Tensor] = {}

    def layer(self, attrs: dict[str, Any]) -> Tensor:
        key = attrs["layer_offset"]
        if key not in self.layers:
            shape = (self.pages, *page_shape(attrs))
            self.layers[key] = torch.full(shape, float("nan"), dtype=KV_DTYPES[attrs["kv_dtype"]])
        return self.layers[key]

    def keys_and_values(self, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Views [page, kv head, token of page, dim] of a layer."""
        heads, size = attrs["kv_heads"], attrs["page_size"]
        keys = heads * size * attrs["head_dim"]
        parts = self.layer(attrs).tensor_split([keys], dim=1)
        k, v = (part.unflatten(1, (heads, size, -1)) for part in parts)
        return k, v


def layer_bytes(attrs: dict[str, Any]) -> int:
    """Bytes of one layer in one page."""
    return math.prod(page_shape(attrs)) * KV_DTYPES[attrs["kv_dtype"]].itemsize
