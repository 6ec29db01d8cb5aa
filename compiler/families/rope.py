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
from compiler.families.spec import DynamicNtk, LongRope, RopeSpec

SUPPORTED = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_spec(
    config: ConfigReader,
    head_dim: int,
    context: int,
    *,
    theta: float = 10000.0,
    partial: float = 1.0,
    interleaved: bool = False,
    layer_type: str | None = None,
) -> RopeSpec:
    """`context` is max_position_embeddings: yarn's original length when the file does not name
    one. `theta` and `partial` (share of a head that rotates) hold where the file is silent;
    `layer_type`: which entry of a `rope_parameters` that has one per type.
    """
    scaling: ConfigReader | None = None
    theta = config.number("rope_theta", theta)
    partial = config.number("partial_rotary_factor", partial)
    if config.has("rope_parameters"):
        scaling = config.section("rope_parameters")
        if layer_type is not None:
            scaling = scaling.section(layer_type)
        theta = scaling.number("rope_theta", theta)
        partial = scaling.number("partial_rotary_factor", partial)
    elif config.has("rope_scaling"):
        scaling = config.section("rope_scaling")
    dim = int(head_dim * partial)
    if dim % 2 or not 0 < dim <= head_dim:
        raise DamagedCheckpoint(
            f"{config.where}: {dim} of {head_dim} dims of a head rotate "
            f"(partial_rotary_factor {partial:g}); rope turns pairs"
        )
    plain = plain_rope(config, dim, theta, interleaved=interleaved)
    if scaling is None:
        return plain
    freq = torch.tensor(plain.inv_freq)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "su" or (kind == "yarn" and scaling.has("short_factor")):
        kind = "longrope"  # its names in early Phi-3 files
    made = plain
    match kind:
        case "default":
            pass
        case "linear":
            made = _replaced(plain, freq / scaling.number("factor"))
        case "dynamic":
            rule = DynamicNtk(theta=theta, factor=scaling.number("factor"), original=context)
            made = _replaced(plain, freq, by_length=rule)
        case "llama3":
            made = _replaced(plain, _llama3(scaling, freq))
        case "yarn":
            freq, scale = _yarn(scaling, freq, theta, dim, context)
            made = _replaced(plain, freq, scale=scale)
        case "longrope":
            made = _longrope(config, scaling, plain, theta, context)
        case _:
            raise CompileError(
                f"{config.where}: rope type {kind!r} is not supported; "
                f"supported: {', '.join(SUPPORTED)}"
            )
    scaling.finish()
    return made


def plain_rope(
    config: ConfigReader, dim: int, theta: float, *, interleaved: bool = False
) -> RopeSpec:
    """theta^(-2i/dim) for the first `dim` dims of a head."""
    if theta <= 0:
        raise DamagedCheckpoint(f"{config.where}: rope_theta is {theta}, expected more than 0")
    freq = 1.0 / (theta ** _exponents(dim))
    return RopeSpec(rotary_dim=dim, inv_freq=tuple(freq.tolist()), interleaved=interleaved)


def _exponents(dim: int) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64).float() / dim


def _replaced(
    plain: RopeSpec,
    freq: torch.Tensor,
    scale: float = 1.0,
    by_length: DynamicNtk | LongRope | None = None,
) -> RopeSpec:
    return RopeSpec(
        rotary_dim=plain.rotary_dim,
        inv_freq=tuple(freq.tolist()),
        scale=scale,
        interleaved=plain.interleaved,
        by_length=by_length,
    )


def _longrope(
    config: ConfigReader, scaling: ConfigReader, plain: RopeSpec, theta: float, context: int
) -> RopeSpec:
    """Every frequency has its own stretch, one list up to the original context, another beyond."""
    key = "original_max_position_embeddings"
    original = scaling.integer(key, config.integer(key, context))
    factor = scaling.number("factor", context / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scale = scaling.number("attention_factor", default)
    half = plain.rotary_dim // 2
    rows = []
    for name in ("short_factor", "long_factor"):
        values = scaling.value(name, list)
        if len(values) != half or not all(isinstance(v, int | float) and v > 0 for v in values):
            raise DamagedCheckpoint(
                f"{config.where}: {name} has {len(values)} entries, expected {half} positive "
                "numbers, one per frequency"
            )
        stretch = torch.tensor(values, dtype=torch.float32)
        rows.append(1.0 / (stretch * theta ** _exponents(plain.rotary_dim)))
    short, long = rows
    rule = LongRope(original=original, long_freq=tuple(long.tolist()))
    same = bool(torch.equal(short, long))
    return _replaced(plain, short, scale, None if same else rule)


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
