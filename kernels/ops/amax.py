"""Largest numbers of activation rows, handed from the call that makes rows to the one that
quantizes them: a scale per row needs the whole row, which no program of a product has.

`out_amax` [R, P] (optional output of what makes rows) holds max |out * amax_norm| of each part of a
row; `amax_norm` [O] is the weight of the norm that the rows' readers begin with, absent where they
begin with none. Parts are WIDTH columns, the last one what is left, or one head of attention. The
numbers are those of `out` as it is stored, products and maxima in float32, so a reader that
multiplies the same numbers finds no larger one.

`x_amax` (optional input of `linear`) is that of `x`, with the weight `norm` of the linear. It
changes nothing of the linear's result: it saves finding a row's largest number again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from kernels.op import Arg

WIDTH = 64  # AMAX_WIDTH of kernels/cuda/rows.py

X_AMAX = Arg(name="x_amax", role="input", dims=("x_rows", "P"), dtypes=("float32",), optional=True)


def amax_norm(columns: str) -> Arg:
    return Arg(name="amax_norm", role="weight", dims=(columns,), dtypes=("float",), optional=True)


def out_amax(rows: str, parts: str = "Q") -> Arg:
    return Arg(
        name="out_amax", role="output", dims=(rows, parts), dtypes=("float32",), optional=True
    )


def parts(columns: int, width: int = WIDTH) -> int:
    """Parts of a row."""
    return -(-columns // width)


def part_maxima(out: Tensor, args: dict[str, Any], width: int = WIDTH) -> Tensor:
    """`out_amax` of rows [R, O]: float32 [R, parts]."""
    norm = args.get("amax_norm")
    size = (out.float() if norm is None else out.float() * norm.float()).abs()
    return pad(size, (0, -size.shape[1] % width)).unflatten(1, (-1, width)).amax(2)
