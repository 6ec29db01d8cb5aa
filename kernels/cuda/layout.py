"""Final weight layouts of the CUDA kernels, packed with numpy.

In: logical weights [N, K] (or a stack [E, N, K]) as float32, bf16 bits (uint16), (int8 codes,
float32 group scales) or (fp8 e4m3 bits uint8, float32 row scales). Out: named field arrays. Called
by the compiler's weight stage and by kernel tests.

Integer codes travel as 32-bit words of P = 4 (int8) or 8 (int4) codes, `code - lowest` each, lowest
bits first. Within a group of G inputs code i of word j belongs to input i * G / P + j: the inputs
of one code position are neighbours, so kernels take a word apart with one shift and one mask per
code, never shuffle, and read the matching activations in runs. Rows keep their order: a gated
weight is gate rows, then up rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

GROUPS = (32, 64, 128, 256)
FORMATS: Mapping[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "fp8": 4}
BITS: Mapping[str, int] = {"int8": 8, "int4": 4}

Array = NDArray[np.generic]


def parse_format(name: str) -> tuple[str, int]:
    """`("int8", 32)` for `int8g32`; group 0 for float formats; `("fp8", 0)` for `fp8r` (a scale per
    row)."""
    match = re.fullmatch(r"(float32|bfloat16)|(fp8)r|(int8|int4)g(\d+)", name)
    if match is None or (match[4] and int(match[4]) not in GROUPS):
        raise ValueError(
            f"storage format {name!r} is unknown: valid are float32, bfloat16, fp8r, int8g<G>,"
            f" int4g<G> with G in {GROUPS}"
        )
    if match[3]:
        return match[3], int(match[4])
    return match[1] or match[2], 0


def fields(
    format: str, n: int, k: int, gated: bool = False
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every stored field of a packed [n, k] weight, without data."""
    return stack_fields(format, (n, k), gated)


def stack_fields(
    format: str, shape: tuple[int, ...], gated: bool = False
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same for a weight [..., n, k]."""
    kind, group = parse_format(format)
    *rows, k = shape
    if group and k % group:
        raise ValueError(
            f"K={k} is not a multiple of the quantization group {group}: choose a smaller group"
        )
    if kind == "fp8":
        return {"data": ("uint8", (*rows, k)), "scale": ("float32", (*rows,))}
    if not group:
        return {"data": ({"float32": "float32", "bfloat16": "uint16"}[kind], (*rows, k))}
    width = k * BITS[kind] // 8
    return {"data": ("uint8", (*rows, width)), "scale": ("float16", (*rows, k // group))}


def pack_linear(
    format: str, weight: Array | tuple[Array, Array], gated: bool = False
) -> dict[str, Array]:
    """Pack float32 [..., N, K], bf16 bits uint16 [..., N, K], (int8 q [..., N, K], float32 scale
    [..., N, K/G]) or (e4m3 bits uint8 [..., N, K], float32 scale [..., N])."""
    kind, group = parse_format(format)
    if not isinstance(weight, tuple):
        return {"data": np.ascontiguousarray(weight)}
    codes, scale = weight
    if kind == "fp8":
        return {
            "data": np.ascontiguousarray(codes).view(np.uint8),
            "scale": np.ascontiguousarray(scale.astype(np.float32)),
        }
    bits = BITS[kind]
    lowest = -(1 << (bits - 1))
    if codes.min(initial=0) < lowest or codes.max(initial=0) > -lowest - 1:
        raise ValueError(
            f"{format}: codes must be within [{lowest}, {-lowest - 1}], found "
            f"[{codes.min()}, {codes.max()}]"
        )
    scale16 = scale.astype(np.float16)
    if not np.isfinite(scale16).all():
        raise ValueError(
            f"{format}: scale {float(np.abs(scale).max()):g} does not fit float16 (65504 at most)"
        )
    per_word = 32 // bits
    unsigned = np.subtract(codes, np.int8(lowest), dtype=np.int8, casting="unsafe").view(np.uint8)
    grouped = unsigned.reshape(*codes.shape[:-1], -1, per_word, group // per_word)
    words = np.zeros((*grouped.shape[:-2], group // per_word), np.uint32)
    for i in range(per_word):
        words |= grouped[..., i, :].astype(np.uint32) << np.uint32(bits * i)
    data = words.reshape(*codes.shape[:-1], -1).view(np.uint8)
    return {"data": data, "scale": np.ascontiguousarray(scale16)}
