"""Final weight layouts of the CUDA kernels, packed with numpy.

In: logical weights [N, K] as float32, bf16 bits (uint16) or (int8 codes, float32 group scales).
Out: named field arrays. Called by the compiler's weight stage and by kernel tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

GROUPS = (32, 64, 128)
FORMATS: Mapping[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}

Array = NDArray[np.generic]


def parse_format(name: str) -> tuple[str, int]:
    """`("int8", 32)` for `int8g32`; group 0 for float formats."""
    match = re.fullmatch(r"(float32|bfloat16)|(int8|int4)g(\d+)", name)
    if match is None or (match[3] and int(match[3]) not in GROUPS):
        raise ValueError(
            f"storage format {name!r} is unknown: valid are float32, bfloat16, int8g<G>, int4g<G>"
            f" with G in {GROUPS}"
        )
    return (match[1], 0) if match[1] else (match[2], int(match[3]))


def fields(
    format: str, n: int, k: int, gated: bool = False
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every stored field of a packed [n, k] weight, without data."""
    kind, group = parse_format(format)
    if group and k % group:
        raise ValueError(
            f"K={k} is not a multiple of the quantization group {group}: choose a smaller group"
        )
    if not group:
        return {"data": ({"float32": "float32", "bfloat16": "uint16"}[kind], (n, k))}
    width = k if kind == "int8" else k // 2
    return {"data": ("uint8", (n, width)), "scale": ("float16", (n, k // group))}


def stack_fields(
    format: str, shape: tuple[int, ...], gated: bool = False
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same for a weight [n, k], or a stack of them [count, n, k] one after the other."""
    *count, n, k = shape
    one = fields(format, n, k, gated)
    return {name: (dtype, (*count, *dims)) for name, (dtype, dims) in one.items()}


def pack_linear(
    format: str, weight: Array | tuple[Array, Array], gated: bool = False
) -> dict[str, Array]:
    """Pack float32 [N, K], bf16 bits uint16 [N, K], or (int8 q [N, K], float32 scale [N, K/G]); a
    stack of matrices has one axis more in front. Rows keep their order: a gated weight is gate
    rows, then up rows."""
    kind, _ = parse_format(format)
    if not isinstance(weight, tuple):
        return {"data": np.ascontiguousarray(weight)}
    codes, scale = weight
    if kind == "int8":
        data: Array = np.ascontiguousarray(codes).view(np.uint8)
    else:
        nibbles = np.add(codes, np.int8(8), dtype=np.int8).view(np.uint8)
        data = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return {"data": data, "scale": np.ascontiguousarray(scale.astype(np.float16))}
