"""Quantization: a scheme turns a float weight into codes and float32 scales, one per group of
inputs (int8, int4) or per output row (fp8, fp8dq), and says what linears quantize their activations
to.

Schemes live one per file and register here; torchao does the integers' arithmetic.
`storage_formats` says how each weight of a model is stored. Called by `compiler.pipeline`; packing
the codes for a target is the kernels' business.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Protocol

import torch

from compiler.errors import CompileError
from compiler.families.names import logical_weights
from compiler.families.spec import ModelSpec

CHUNK = 1 << 20  # elements at a time: torchao makes several passes, this keeps them in cache (3x)


class Scheme(Protocol):
    """`bits` of a code; `group`s are inputs that share a scale, 0 where a whole row does;
    `x_format` as in the op `linear`, "" for weights alone."""

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def x_format(self) -> str: ...

    def format(self, group: int) -> str:
        """The storage format string kernels know."""
        ...

    def refuse(self, inputs: int, group: int, what: str) -> None:
        """CompileError when `what`, with so many inputs, cannot be cut into groups."""
        ...

    def scale_bytes(self, inputs: int, group: int) -> int:
        """Bytes of scales of one output row."""
        ...

    def quantize(self, w: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [..., N, K] as layouts pack them, and float32 scales, of w [..., N, K]."""
        ...

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The float32 weight that the stored codes and scales stand for."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScheme:
    """Symmetric integer codes in [low, high], one scale per output row and group of inputs, stored
    as float16."""

    name: str
    low: int
    high: int
    x_format: str = ""

    @property
    def bits(self) -> int:
        return 8 if self.high > 7 else 4

    def format(self, group: int) -> str:
        """E.g. `int8g32`."""
        return f"{self.name}g{group}"

    def refuse(self, inputs: int, group: int, what: str) -> None:
        if inputs % group:
            fits = [g for g in (16, 32, 64, 128, 256) if inputs % g == 0]
            raise CompileError(
                f"quant.group_size={group} does not divide the {inputs} inputs of {what}; "
                f"choices: {', '.join(map(str, fits)) or 'none (use quant=none)'}"
            )

    def scale_bytes(self, inputs: int, group: int) -> int:
        return inputs // group * 2

    def quantize(self, w: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int8 [N, K] and scales float32 [N, K / group] of w [N, K]; or of a stack
        [E, N, K]."""
        if w.dim() == 3:
            codes_ENK, scales_ENG = self.quantize(w.flatten(0, 1), group)
            return codes_ENK.unflatten(0, w.shape[:2]), scales_ENG.unflatten(0, w.shape[:2])
        # torchao logs about optional CUDA extensions when imported: noise on a CPU machine.
        logging.disable(logging.WARNING)
        try:
            from torchao.quantization.quant_primitives import (
                MappingType,
                choose_qparams_affine,
                quantize_affine,
            )
        finally:
            logging.disable(logging.NOTSET)
        span, block = (torch.int8, self.low, self.high), (1, group)
        codes: list[torch.Tensor] = []
        scales: list[torch.Tensor] = []
        for part in w.split(max(1, CHUNK // w.shape[1])):
            x = part.float()
            scale, zero = choose_qparams_affine(
                x, MappingType.SYMMETRIC, block, *span, scale_dtype=torch.float32
            )
            codes.append(quantize_affine(x, block, scale, zero, *span))
            scales.append(scale)
        return torch.cat(codes), torch.cat(scales)

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return dequantize(codes, scale.half().float())


SCHEMES: dict[str, Scheme] = {}


def register(scheme: Scheme) -> Scheme:
    if scheme.name in SCHEMES:
        raise ValueError(f"scheme {scheme.name!r} is registered twice")
    SCHEMES[scheme.name] = scheme
    return scheme


def parse_format(format: str) -> tuple[Scheme, int] | None:
    """A scheme that stores it and its group (0: a whole row); None for `float32`, `bfloat16`."""
    match = re.fullmatch(r"([a-z]+\d+)(?:g(\d+)|r)", format)
    if match is None:
        return None
    return SCHEMES[match.group(1)], int(match.group(2) or 0)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 weight that codes and scales stand for: what accuracy is measured against."""
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale.unsqueeze(-1)).flatten(-2)


def storage_formats(
    spec: ModelSpec, *, dtype: str, scheme: str, group: int, head: bool
) -> dict[str, str]:
    """Storage format by weight name: vectors and routers float32, matrices quantized, tables
    (embedding, head) only with `head`; an untied embedding is looked up, never multiplied, and
    stays in `dtype`. (A router is small, and a rounded one sends tokens to other experts.)
    """
    formats: dict[str, str] = {}
    for name, shape in logical_weights(spec).items():
        table = name in ("embed", "head", "position_table", "token_types")
        if len(shape) == 1 or name.endswith("router"):
            formats[name] = "float32"
        elif scheme == "none" or (
            table and not (head and (name == "head" or (name == "embed" and spec.tied)))
        ):
            formats[name] = dtype
        else:
            SCHEMES[scheme].refuse(shape[-1], group, name)
            formats[name] = SCHEMES[scheme].format(group)
    return formats
