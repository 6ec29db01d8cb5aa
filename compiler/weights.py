"""Logical weights by canonical name, from a checkpoint or from a seed. `compiler.pipeline` fetches
them in load order, one (or the rows of a merged one) at a time, so a model larger than memory
streams through.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from compiler.checkpoint import Checkpoint
from compiler.errors import DamagedCheckpoint
from compiler.families.family import Family
from compiler.families.names import NameMap, bind, logical_weights
from compiler.families.spec import ModelSpec
from kernels.cpu.layout import WIDENED

CHUNK = 1 << 20  # numbers looked at in one piece
RANDOM_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Weights(Protocol):
    """`fetch` gives one weight as the checkpoint stores it (float32, bfloat16 or float16),
    finite. `in_bfloat16`: whether every number of it is one of bfloat16, however it is stored.
    """

    def fetch(self, name: str) -> torch.Tensor: ...
    def in_bfloat16(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """`dropped`: tensors the family leaves out, as `by_module` counts them."""

    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, ...]]
    names: NameMap
    dropped: Mapping[str, int]

    def fetch(self, name: str) -> torch.Tensor:
        parts = [s.apply(self.checkpoint.tensor(s.tensor)) for s in self.names[name]]
        if len(parts) > 1:
            shape = (-1, *self.shapes[name][1:][-1:])  # rows, also of a stack of matrices
            parts = [torch.cat([p.reshape(shape) for p in parts])]
        x = parts[0].reshape(self.shapes[name])
        if not torch.isfinite(x).all():
            tensors = ", ".join(s.tensor for s in self.names[name])
            raise DamagedCheckpoint(
                f"{self.checkpoint.path}: {tensors} holds NaN or infinity; "
                "download the checkpoint again"
            )
        return x

    def in_bfloat16(self, name: str) -> bool:
        """Numbers are looked at unless their file says so, up to the first that is none."""
        return all(
            (s.then is None and self.checkpoint.in_bfloat16(s.tensor))
            or all_bfloat16(s.apply(self.checkpoint.tensor(s.tensor)))
            for s in self.names[name]
        )


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Uniform numbers with variance 1 / fan-in, so activations and logits stay near 1 at any size,
    rounded to `dtype` as a published checkpoint's are. Each weight has its own generator keyed by
    seed and name: independent of order, the same on every machine.
    """

    spec: ModelSpec
    shapes: dict[str, tuple[int, ...]]
    seed: int
    dtype: torch.dtype

    def fetch(self, name: str) -> torch.Tensor:
        return self._drawn(name).to(self.dtype)

    def in_bfloat16(self, name: str) -> bool:
        return self.dtype == torch.bfloat16

    def _drawn(self, name: str) -> torch.Tensor:
        shape, part = self.shapes[name], name.rsplit(".", 1)[-1]
        if part.endswith("_norm"):
            return torch.ones(shape)
        key = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        count = math.prod(shape)
        raw = np.random.PCG64(int.from_bytes(key[:16], "little")).random_raw((count + 3) // 4)
        # Four numbers per draw: 16 bits each are plenty for a made-up weight and four times as
        # fast.
        values = torch.from_numpy(raw.astype("<u8", copy=False).view("<u2")[:count]).float()
        variance = 0.02**2 if len(shape) == 1 else 1 / shape[-1]
        if part in (
            "o",
            "down",
            "experts_down",
            "shared_down",
        ):  # both write into the residual stream, twice per layer
            variance /= 2 * len(self.spec.layers)
        return values.sub_(32767.5).mul_(math.sqrt(12 * variance) / 65536).view(shape)


def checkpoint_weights(
    family: Family, spec: ModelSpec, checkpoint: Checkpoint
) -> CheckpointWeights:
    """Weights of a checkpoint, after every name and shape in it has been checked."""
    names = _as_spelled(family.names(spec), family.prefix, frozenset(checkpoint.names()))
    left = bind(spec, names, checkpoint, family.ignorable_tensors(spec))
    dropped = by_module(left, (s.tensor for sources in names.values() for s in sources))
    return CheckpointWeights(checkpoint, logical_weights(spec), names, dropped)


def by_module(left: Iterable[str], used: Iterable[str]) -> dict[str, int]:
    """Numbers of tensors in `left` by the largest module none of `used` is in (`vision_tower.*`),
    or by name where there is none; `*` stands for the number of a layer.
    """
    inside = {name[:i] for name in used for i, character in enumerate(name) if character == "."}
    counts: dict[str, int] = {}
    for name in sorted(left):
        parts = name.split(".")
        size = next(n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) not in inside)
        own = [*parts[:size], "*"] if size < len(parts) else parts
        numbered = ["*" if part.isdigit() and i < size - 1 else part for i, part in enumerate(own)]
        group = ".".join(numbered)
        counts[group] = counts.get(group, 0) + 1
    return counts


def _as_spelled(names: NameMap, prefix: str, present: frozenset[str]) -> NameMap:
    """The map with the names this checkpoint uses: without the prefix where none has it, and with
    the old names of a norm's weight and bias (TensorFlow's gamma and beta)."""
    bare = bool(prefix) and not any(name.startswith(prefix) for name in present)

    def spelled(tensor: str) -> str:
        tensor = tensor.removeprefix(prefix) if bare else tensor
        for new, old in (
            ("LayerNorm.weight", "LayerNorm.gamma"),
            ("LayerNorm.bias", "LayerNorm.beta"),
        ):
            if tensor.endswith(new) and tensor not in present:
                other = tensor.removesuffix(new) + old
                return other if other in present else tensor
        return tensor

    return {
        name: tuple(replace(s, tensor=spelled(s.tensor)) for s in sources)
        for name, sources in names.items()
    }


def random_weights(spec: ModelSpec, seed: int, dtype: str = "float32") -> RandomWeights:
    """`dtype`: what the shape's checkpoints are published as; any other than bfloat16 and float16
    leaves float32."""
    rounded = RANDOM_DTYPES.get(dtype, torch.float32)
    return RandomWeights(spec, logical_weights(spec), seed, rounded)


def all_bfloat16(x: torch.Tensor) -> bool:
    """Whether the lower half of every number, as float32, is zero."""
    if x.dtype == torch.bfloat16:
        return True
    parts = x.split(max(1, CHUNK // max(1, x[:1].numel())))
    return not any((p.float().contiguous().view(torch.int32) & 0xFFFF).any() for p in parts)


def rows(weights: Weights, names: tuple[str, ...]) -> torch.Tensor:
    """One weight, or several concatenated along their rows (a merged projection)."""
    if len(names) == 1:
        return weights.fetch(names[0])
    return torch.cat([weights.fetch(name) for name in names])


def stored(x: torch.Tensor, dtype: str) -> np.ndarray:
    """Numbers as `float32`, or as the bit patterns (uint16) of `bfloat16` (widened again or not),
    rounded to nearest even.
    """
    if dtype == "float32":
        return x.float().contiguous().numpy()
    if dtype in ("bfloat16", WIDENED):
        return x.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    raise ValueError(f"no stored form for {dtype!r}")
