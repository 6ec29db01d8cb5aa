"""Precisions of the torch peers: the dtype to build a model in and torchao's weight-only
quantization on top of it.
"""

from __future__ import annotations

import torch
from torch import nn

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}


def quantize(model: nn.Module, precision: str) -> None:
    """Weight-only int8 (per channel) or int4 (groups of 32) of every linear, in place."""
    if precision not in ("int8", "int4"):
        return
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    int4 = PrototypeInt4WeightOnlyConfig(group_size=32)  # torchao's only int4 that runs on CPU
    quantize_(model, Int8WeightOnlyConfig() if precision == "int8" else int4)
