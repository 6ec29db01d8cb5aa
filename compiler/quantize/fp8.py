"""fp8 (e4m3) weights: one float32 scale per output row brings its largest weight to 448.

`fp8` is weight only: decoding reads half the bytes, activations stay as they are. `fp8dq` stores
the same weights and has linears quantize their activations too, each row at run time by its own
scale (torchao's float8 dynamic quantization per row): large batches multiply on fp8 tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compiler.quantize.scheme import register

LARGEST = 448.0  # of e4m3


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScheme:
    """Codes are the bits of e4m3 numbers, uint8; torch rounds to nearest even."""

    name: str
    x_format: str = ""
    bits: int = 8

    def format(self, group: int) -> str:
        return "fp8r"

    def refuse(self, inputs: int, group: int, what: str) -> None:
        """A row is never cut."""

    def scale_bytes(self, inputs: int, group: int) -> int:
        return 4

    def quantize(self, w: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes uint8 [..., N, K] and scales float32 [..., N] of w [..., N, K]."""
        scale = w.abs().amax(-1).float() / LARGEST
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a row of zeros
        codes = (w.float() / scale.unsqueeze(-1)).clamp(-LARGEST, LARGEST)
        return codes.to(torch.float8_e4m3fn).view(torch.uint8), scale

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.float8_e4m3fn).float() * scale.unsqueeze(-1)


FP8 = register(RowScheme(name="fp8"))
FP8DQ = register(RowScheme(name="fp8dq", x_format="fp8"))
