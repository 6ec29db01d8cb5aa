"""Final weight layouts of the CPU kernels, packed with numpy.

In: logical weights [N,K] as float32, bf16 bits (uint16) or (int8 values, float32 group scales).
`bfloat16_widened` is laid out as bfloat16; its products are those of the same numbers in float32.
Out: named field arrays, byte for byte what kernels/cpu/linear.h describes. Called by the compiler's
weight stage and by the kernel tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

TILE = 32  # outputs per tile; of a gated weight one half each of gate and up
ROW_BLOCK = 16  # prepared rows come in blocks of so many (an AMX tile)
BF16_STEP = 32  # K of a bf16 tile row block is padded to this (one AMX step)
GROUPS = (32, 64, 128)
WIDENED = "bfloat16_widened"
# enum Format in linear.h
FORMAT_CODES: Mapping[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, WIDENED: 4}
# Ends of the names of entries that read one kind of weight.
SUFFIXES: Mapping[str, str] = {
    "float32": "f32",
    "bfloat16": "bf16",
    "int8": "int8",
    "int4": "int4",
    WIDENED: "bf16_widened",
}

Array = NDArray[np.generic]


def parse_format(name: str) -> tuple[str, int]:
    """`("int8", 32)` for `int8g32`; group 0 for float formats."""
    match = re.fullmatch(rf"(float32|bfloat16|{WIDENED})|(int8|int4)g(\d+)", name)
    if match is None:
        raise ValueError(
            f"storage format {name!r} is unknown: valid are float32, bfloat16, {WIDENED}, "
            f"int8g<G>, int4g<G> with G in {GROUPS}"
        )
    if match[1]:
        return match[1], 0
    group = int(match[3])
    if group not in GROUPS:
        raise ValueError(f"storage format {name!r} has group {group}: valid groups are {GROUPS}")
    return match[2], group


def misfit(name: str, kind: str, k: int) -> str | None:
    """Why a kernel that reads weights of `kind` cannot read rows of `k` stored as `name`; None when
    it can."""
    try:
        stored, group = parse_format(name)
    except ValueError as error:
        return str(error)
    if stored != kind:
        return f"stored as {name}, this kernel reads {kind}"
    if group and k % group:
        return f"K={k} is not a multiple of the quantization group {group}"
    return None


def _padded_rows(n: int, gated: bool) -> int:
    if gated and n % 2:
        raise ValueError(f"a gated weight holds gate and up rows: N={n} is odd, pass cat(gate, up)")
    per_tile = TILE // 2 if gated else TILE
    outputs = n // 2 if gated else n
    return -(-outputs // per_tile) * TILE


def fields(
    format: str, n: int, k: int, gated: bool = False
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every stored field of a packed [n,k] weight, without data."""
    kind, group = parse_format(format)
    tiles = _padded_rows(n, gated) // TILE
    if group and k % group:
        raise ValueError(
            f"K={k} is not a multiple of the quantization group {group}: choose a smaller group"
        )
    if kind == "float32":
        return {"data": ("float32", (tiles, k, TILE))}
    if kind in ("bfloat16", WIDENED):
        return {"data": ("uint16", (tiles, -(-k // BF16_STEP) * BF16_STEP // 2, TILE, 2))}
    step = 4 if kind == "int8" else 8
    return {
        "data": ("uint8", (tiles, k // step, TILE, 4)),
        "scale": ("float16", (tiles, k // group, TILE)),
    }


def stack_fields(
    format: str, shape: tuple[int, ...], gated: bool = False
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same for a weight [n,k], or a stack of them [count,n,k] packed one after the other."""
    *count, n, k = shape
    one = fields(format, n, k, gated)
    return {name: (dtype, (*count, *dims)) for name, (dtype, dims) in one.items()}


def _arrange(rows: Array, gated: bool) -> Array:
    """[N,K] -> [tiles, 32, K]: pad the outputs with zeros, put gate and up side by side."""
    n, k = rows.shape
    padded = _padded_rows(n, gated)
    parts = np.split(rows, 2) if gated else [rows]
    out = np.zeros((len(parts), padded // len(parts), k), rows.dtype)
    for i, part in enumerate(parts):
        out[i, : len(part)] = part
    return out.reshape(len(parts), -1, TILE // len(parts), k).swapaxes(0, 1).reshape(-1, TILE, k)


def pack_linear(
    format: str, weight: Array | tuple[Array, Array], gated: bool = False
) -> dict[str, Array]:
    """Pack float32 [N,K], bf16 bits uint16 [N,K], or (int8 q [N,K], float32 scale [N,K/G]); or a
    stack of any of them (one more axis in front)."""
    kind, group = parse_format(format)
    values = weight[0] if isinstance(weight, tuple) else weight
    if values.ndim == 3:
        return _pack_stack(format, weight, gated)
    n, k = values.shape
    fields(format, n, k, gated)  # refuses what cannot be packed
    wanted = {"float32": "float32", "bfloat16": "uint16", WIDENED: "uint16"}.get(kind, "int8")
    if values.dtype != wanted or isinstance(weight, tuple) != bool(group):
        raise ValueError(
            f"{format} is packed from {wanted}{' with scales' if group else ''}, got {values.dtype}"
            f"{' with scales' if isinstance(weight, tuple) else ''}"
        )
    tiles = _arrange(values, gated)
    if kind == "float32":
        return {"data": np.ascontiguousarray(tiles.swapaxes(1, 2))}
    if kind in ("bfloat16", WIDENED):
        padding = (-k) % BF16_STEP
        pairs = np.pad(tiles, ((0, 0), (0, 0), (0, padding))).reshape(len(tiles), TILE, -1, 2)
        return {"data": np.ascontiguousarray(pairs.swapaxes(1, 2))}
    assert isinstance(weight, tuple)
    quads = np.ascontiguousarray(tiles.reshape(len(tiles), TILE, -1, 4).swapaxes(1, 2))
    if kind == "int8":
        data: Array = quads.view(np.uint8) ^ np.uint8(128)
    else:
        if values.min() < -8 or values.max() > 7:
            raise ValueError(f"int4 values must lie in -8..7, got {values.min()}..{values.max()}")
        nibbles = np.add(quads, np.int8(8), dtype=np.int8).view(np.uint8)
        data = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return {"data": data, "scale": _pack_scale(weight[1], (n, k // group), gated)}


def _pack_stack(format: str, weight: Array | tuple[Array, Array], gated: bool) -> dict[str, Array]:
    parts = weight if isinstance(weight, tuple) else (weight,)
    out: dict[str, Array] = {}
    for name, (dtype, shape) in stack_fields(format, parts[0].shape, gated).items():
        out[name] = np.empty(shape, dtype)
    for i in range(len(parts[0])):
        one = (parts[0][i], parts[1][i]) if len(parts) == 2 else parts[0][i]
        for name, array in pack_linear(format, one, gated).items():
            out[name][i] = array
    return out


def _pack_scale(scale: Array, shape: tuple[int, int], gated: bool) -> Array:
    if scale.shape != shape or scale.dtype != np.float32:
        raise ValueError(f"scales must be float32 {shape}, got {scale.dtype} {scale.shape}")
    largest = float(np.abs(scale).max(initial=0.0))
    if not largest <= float(np.finfo(np.float16).max):
        raise ValueError(f"scale {largest} does not fit float16 (max 65504): store it as bfloat16")
    packed = _arrange(scale, gated).swapaxes(1, 2).astype(np.float16)
    return np.ascontiguousarray(packed)


def pack_kv(keys: Array, values: Array) -> NDArray[np.uint8]:
    """Keys [pages, K, 16, E] and values [pages, K, 16, V] of a layer (float32, or bits of bf16 as
    uint16, of fp8 as uint8) -> bytes [pages, layer bytes], as in kernels/cpu/kv_page.h."""
    pages, heads, size, dim = keys.shape
    step = 2 if keys.dtype == np.uint16 else 1  # dims of a key that lie side by side
    k = (
        keys.reshape(pages, heads, size, dim // step, step)
        .transpose(0, 1, 3, 2, 4)
        .reshape(pages, heads, -1)
    )
    both = np.concatenate((k, values.reshape(pages, heads, -1)), axis=2)
    return np.ascontiguousarray(both).view(np.uint8).reshape(pages, -1)


def unpack_kv(
    packed: NDArray[np.uint8], kv_heads: int, page_size: int, head_dim: int, dtype: str
) -> tuple[Array, Array]:
    """The inverse of pack_kv; `dtype` float32, uint16 or uint8."""
    both = np.ascontiguousarray(packed).view(dtype).reshape(len(packed), kv_heads, -1)
    keys, values = np.split(both, [page_size * head_dim], axis=2)
    step = 2 if dtype == "uint16" else 1
    k = keys.reshape(len(packed), kv_heads, head_dim // step, page_size, step)
    shape = (len(packed), kv_heads, page_size, -1)
    return k.transpose(0, 1, 3, 2, 4).reshape(shape), values.reshape(shape)
