"""Rotary frequencies from a config, both spellings: `rope_theta` + `rope_scaling`, or one
`rope_parameters`.

Frequencies are computed in float32 by the formulas the models were trained with, so they equal the
reference's bit for bit. Called by the families.
"""

from __future__ import annotations

import math

import torch

from compiler.checkpoint import ConfigReader
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.families.spec import RopeSpec

SUPPORTED = ("default", "linear", "llama3", "yarn")


def rope_spec(config: ConfigReader, head_dim: int, context: int) -> RopeSpec:
    """`context` is max_position_embeddings: yarn's original length when the file does not name
    one.
    """
    modern = config.has("rope_parameters")
    scaling: ConfigReader | None = None
    if modern:
        scaling = config.section("rope_parameters")
        theta = scaling.number("rope_theta", config.number("rope_theta", 10000.0))
        partial = scaling.number("partial_rotary_factor", 1.0)
    else:
        theta, partial = config.number("rope_theta", 10000.0), 1.0
        if config.has("rope_scaling"):
            scaling = config.section("rope_scaling")
    if config.number("partial_rotary_factor", partial) != 1.0:
        raise CompileError(f"{config.where}: partial_rotary_factor {partial} is not supported here")
    if theta <= 0:
        raise DamagedCheckpoint(f"{config.where}: rope_theta is {theta}, expected more than 0")
    powers = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freq, scale = 1.0 / (theta**powers), 1.0
    if scaling is not None:
        kind = scaling.text("rope_type", scaling.text("type", "default"))
        if kind == "linear":
            freq = freq / scaling.number("factor")
        elif kind == "llama3":
            freq = _llama3(scaling, freq)
        elif kind == "yarn":
            freq, scale = _yarn(scaling, freq, theta, head_dim, context)
        elif kind != "default":
            raise CompileError(
                f"{config.where}: rope type {kind!r} is not supported; "
                f"supported: {', '.join(SUPPORTED)}"
            )
        scaling.finish()
    return RopeSpec(rotary_dim=head_dim, inv_freq=tuple(freq.tolist()), scale=scale)


def _llama3(scaling: ConfigReader, freq: torch.Tensor) -> torch.Tensor:
    factor, original = scaling.number("factor"), scaling.integer("original_max_position_embeddings")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    wavelength = 2 * math.pi / freq
    slow = torch.where(wavelength > original / low, freq / factor, freq)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * slow / factor + smooth * slow
    middle = ~(wavelength < original / high) * ~(wavelength > original / low)
    return torch.where(middle, blended, slow)


def _yarn(
    scaling: ConfigReader, freq: torch.Tensor, theta: float, dim: int, context: int
) -> tuple[torch.Tensor, float]:
    factor = scaling.number("factor")
    original = scaling.integer("original_max_position_embeddings", context)

    def corrected(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low = corrected(scaling.number("beta_fast", 32.0))
    high = corrected(scaling.number("beta_slow", 1.0))
    if scaling.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    keep = 1 - ramp.clamp(0, 1)  # 1: as trained, 0: stretched by the factor
    mscale, mscale_all = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    default = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    # The order of the divisions is the reference's: 1 / (factor * theta^p), not (1 / theta^p) /
    # factor.
    powers = torch.arange(0, dim, 2).float() / dim
    stretched = 1.0 / (factor * theta**powers)
    return stretched * (1 - keep) + freq * keep, scaling.number("attention_factor", default)
