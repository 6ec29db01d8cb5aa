"""The program: a straight-line list of op calls over named values, the compiler's only intermediate form.

`build` makes one, fusion rules rewrite it, `lower` binds it to kernels. It prints one call per line and is verified
before and after every stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Dim = int | str  # symbolic: "tokens", "seqs", "pages" (width of a page-table row)

KINDS = ("weight", "state", "input", "output", "temp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """`dtype` is the element type the op sees (a quantized weight is still `float32` here; its storage format is decided by
    the quantize stage and looked up by name)."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """`ins` and `outs` map the op's argument names to value names. An `inout` argument stands in both with the same value."""

    op: str
    ins: Mapping[str, str]
    outs: Mapping[str, str]
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    values: Mapping[str, Value]
    calls: tuple[Call, ...]
