"""Canonical weight names and where a checkpoint keeps them.

`logical_weights(spec)` lists what a model needs; a `NameMap` says for each from which checkpoint
tensors it is made. `bind` holds both against a checkpoint: every weight found with its shape,
every tensor used or listed as unused, else an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from compiler.errors import CompileError, DamagedCheckpoint, ProgramError
from compiler.families.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One checkpoint tensor, or part of it: take `rows` (start, stop), reshape to `view`, reorder
    axes by `order`. What is left is reshaped to the weight (its rows, when several sources are
    concatenated).
    """

    tensor: str
    rows: tuple[int, int] | None = None
    view: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            x = x[self.rows[0] : self.rows[1]]
        if self.view:
            x = x.reshape(self.view)
        return x.permute(self.order) if self.order else x


NameMap = Mapping[str, tuple[Source, ...]]  # canonical name <- sources, concatenated along rows


class Tensors(Protocol):
    """What `bind` needs of a checkpoint."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...


def logical_weights(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by canonical name, in load order."""
    d = spec.dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (spec.vocab, d)}
    for i, layer in enumerate(spec.layers):
        a, f, own = layer.mixer, layer.ffn, f"layers.{i}."
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        shapes[own + "attn_norm"] = (d,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[own + name] = (rows, d)
            if a.qkv_bias:
                shapes[f"{own}{name}_bias"] = (rows,)
        if a.head_norm is not None:
            shapes[own + "q_norm"] = shapes[own + "k_norm"] = (a.head_dim,)
        shapes[own + "o"] = (d, q)
        if a.out_bias:
            shapes[own + "o_bias"] = (d,)
        shapes[own + "ffn_norm"] = (d,)
        for name, rows, columns in (("gate", f.width, d), ("up", f.width, d), ("down", d, f.width)):
            shapes[own + name] = (rows, columns)
            if f.bias:
                shapes[f"{own}{name}_bias"] = (rows,)
    shapes["final_norm"] = (d,)
    if not spec.tied_head:
        shapes["head"] = (spec.vocab, d)
    return shapes


LLAMA_NAMES = {
    "embed": "model.embed_tokens.weight",
    "attn_norm": "input_layernorm.weight",
    **{n: f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"{n}_bias": f"self_attn.{n}_proj.bias" for n in "qkvo"},
    **{f"{n}_norm": f"self_attn.{n}_norm.weight" for n in "qk"},
    "ffn_norm": "post_attention_layernorm.weight",
    **{n: f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
    **{f"{n}_bias": f"mlp.{n}_proj.bias" for n in ("gate", "up", "down")},
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}


def llama_names(spec: ModelSpec) -> NameMap:
    """The Hugging Face names that most families share."""
    result: dict[str, tuple[Source, ...]] = {}
    for name in logical_weights(spec):
        if name.startswith("layers."):
            _, index, part = name.split(".")
            tensor = f"model.layers.{index}.{LLAMA_NAMES[part]}"
        else:
            tensor = LLAMA_NAMES[name]
        result[name] = (Source(tensor=tensor),)
    return result


def bind(spec: ModelSpec, names: NameMap, tensors: Tensors, unused: Iterable[str]) -> None:
    """Raise unless the map covers the spec exactly and the checkpoint covers the map exactly.
    `unused`: patterns of tensors that may be left over.
    """
    shapes = logical_weights(spec)
    if names.keys() != shapes.keys():
        wrong = sorted(names.keys() ^ shapes.keys())[0]
        raise ProgramError(f"family {spec.family}: name map and spec disagree about {wrong!r}")
    present, taken = set(tensors.names()), dict[str, int]()
    for name, sources in names.items():
        for source in sources:
            if source.tensor not in present:
                raise DamagedCheckpoint(
                    f"tensor {source.tensor} is missing from the checkpoint; {name} "
                    f"{list(shapes[name])} is made from it"
                )
        parts = [_part_shape(s, tensors.shape(s.tensor)) for s in sources]
        sizes = [math.prod(p) for p in parts]
        exact = len(parts) > 1 or bool(sources[0].view) or parts[0] == shapes[name]
        if sum(sizes) != math.prod(shapes[name]) or not exact:
            found = " + ".join(f"{s.tensor} {list(tensors.shape(s.tensor))}" for s in sources)
            raise DamagedCheckpoint(
                f"{found} cannot be {name} {list(shapes[name])}: config.json and weights disagree"
            )
        for source, size in zip(sources, sizes, strict=True):
            taken[source.tensor] = taken.get(source.tensor, 0) + size
    ignorable = re.compile("|".join(f"(?:{p})" for p in unused) or r"(?!)")
    for tensor in tensors.names():
        if tensor not in taken and not ignorable.fullmatch(tensor):
            raise CompileError(
                f"tensor {tensor} {list(tensors.shape(tensor))} is not used by family "
                f"{spec.family}; the checkpoint holds more than the model"
            )
        whole = math.prod(tensors.shape(tensor))
        if tensor in taken and taken[tensor] != whole:
            raise ProgramError(
                f"family {spec.family}: {taken[tensor]} of {whole} elements of {tensor} are used"
            )


def _part_shape(source: Source, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape after `Source.apply`, without data."""
    return tuple(source.apply(torch.empty(shape, device="meta")).shape)
