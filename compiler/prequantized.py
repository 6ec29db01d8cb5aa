"""Checkpoints whose weights are stored quantized, presented as the bfloat16 weights they stand for.

Comes in: the entries of a checkpoint and its config. Goes out: stand-ins, tensors computed from
stored ones when they are read. Formats: DeepSeek's fp8 (one scale per block of rows and columns,
as its fp8_cast_bf16.py reads them) and MXFP4 of experts (OCP Microscaling Formats 1.0, as gpt-oss
is published). Called by `compiler.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compiler.errors import CompileError, DamagedCheckpoint
from compiler.safetensors_file import Entry

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
# e2m1: sign, two bits of exponent, one of mantissa.
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Raw = Callable[[str], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """A tensor of `shape` made from the stored `parts` by `read`."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    read: Callable[[Raw], torch.Tensor]


def stand_ins(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, StandIn]:
    """By the name under which the unquantized checkpoint has the tensor."""
    found: dict[str, StandIn] = {}
    for name, entry in entries.items():
        if entry.dtype == "F8_E4M3" and name + SCALE in entries:
            found[name] = _fp8(name, entry.shape, entries[name + SCALE].shape, _block(config))
        elif name.endswith(BLOCKS) and entry.dtype == "U8":
            base = name.removesuffix(BLOCKS)
            if base + SCALES in entries:
                found[base] = _mxfp4(base, entry.shape, entries[base + SCALES].shape)
    return found


def check_method(quantization: Mapping[str, Any], where: str) -> None:
    """Raise unless the `quantization_config` names a format that is read."""
    if (scheme := quantization.get("kv_cache_scheme")) is not None:
        raise CompileError(
            f"{where}: kv_cache_scheme {scheme!r} asks for scaled keys and values, and pages are "
            "stored without scales; set it to null and choose kv=fp8_e4m3 or fp8_e5m2 instead"
        )
    method = quantization.get("quant_method")
    if method == "mxfp4" or (method == "fp8" and quantization.get("weight_block_size")):
        return
    raise CompileError(
        f"{where}: checkpoints quantized by {method!r} are not read; readable: fp8 in blocks, "
        "mxfp4; use the original"
    )


def _block(config: Mapping[str, Any]) -> tuple[int, int]:
    size = (config.get("quantization_config") or {}).get("weight_block_size")
    sizes = size if isinstance(size, list) else []
    if len(sizes) != 2 or not all(type(s) is int and s > 0 for s in sizes):
        raise DamagedCheckpoint(
            f"config.json: weight_block_size is {size!r}, expected two positive numbers for the "
            "fp8 tensors of the checkpoint"
        )
    return sizes[0], sizes[1]


def _fp8(
    name: str, shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]
) -> StandIn:
    expected = tuple(-(-size // b) for size, b in zip(shape, block, strict=False))
    if len(shape) != 2 or scales != expected:
        raise DamagedCheckpoint(
            f"tensor {name}{SCALE} is {list(scales)}, expected {list(expected)} for {list(shape)} "
            f"in blocks of {list(block)}"
        )

    def read(raw: Raw) -> torch.Tensor:
        out = torch.empty(shape, dtype=torch.bfloat16)
        codes, scale = raw(name), raw(name + SCALE).float()
        for i, row in enumerate(scale):  # one row of blocks at a time: little memory
            part = slice(i * block[0], (i + 1) * block[0])
            columns = row.repeat_interleave(block[1])[: shape[1]]
            out[part] = (codes[part].float() * columns).bfloat16()
        return out

    return StandIn(shape=shape, parts=(name, name + SCALE), read=read)


def _mxfp4(name: str, blocks: tuple[int, ...], scales: tuple[int, ...]) -> StandIn:
    """[E, rows, G, 16] bytes of two codes (the first in the low half) and [E, rows, G] powers of
    two, as the matrices [E, 32 G, rows] of the unquantized file."""
    if len(blocks) != 4 or blocks[3] != 16 or scales != blocks[:3]:
        raise DamagedCheckpoint(
            f"tensors {name}{BLOCKS} {list(blocks)} and {name}{SCALES} {list(scales)} are not "
            "[E, rows, G, 16] and [E, rows, G]"
        )
    experts, rows, groups = scales

    def read(raw: Raw) -> torch.Tensor:
        out = torch.empty(experts, 32 * groups, rows, dtype=torch.bfloat16)
        codes, powers = raw(name + BLOCKS), raw(name + SCALES)
        for e in range(experts):
            pairs = torch.stack((codes[e] & 15, codes[e] >> 4), dim=-1).flatten(-2)
            values = torch.ldexp(FP4[pairs.int()], powers[e].int()[..., None] - 127)
            out[e] = values.flatten(1).T
        return out

    return StandIn(
        shape=(experts, 32 * groups, rows), parts=(name + BLOCKS, name + SCALES), read=read
    )
