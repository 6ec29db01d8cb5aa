"""Canonical weight names and where a checkpoint keeps them.

`logical_weights(spec)` lists what a model needs; a `NameMap` says for each from which checkpoint
tensors it is made. `bind` holds both against a checkpoint: every weight found with its shape,
every tensor used or listed as unused, else an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from compiler.errors import CompileError, DamagedCheckpoint, ProgramError
from compiler.families.spec import (
    Attention,
    GatedFfn,
    HeadSpec,
    LayerNorm,
    Mla,
    ModelSpec,
    MoeFfn,
    NormSpec,
    PlainFfn,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One checkpoint tensor, or part of it: take `rows` (start, stop), reshape to `view`, take
    `part` (start, stop) of axis 1 of that, reorder axes by `order`, apply `then` to the float32
    values. What is left is reshaped to the weight (its rows, when several sources are
    concatenated).
    """

    tensor: str
    rows: tuple[int, int] | None = None
    view: tuple[int, ...] = ()
    part: tuple[int, int] | None = None
    order: tuple[int, ...] = ()
    then: Callable[[torch.Tensor], torch.Tensor] | None = None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            x = x[self.rows[0] : self.rows[1]]
        if self.view:
            x = x.reshape(self.view)
        if self.part is not None:
            x = x[:, self.part[0] : self.part[1]]
        if self.order:
            x = x.permute(self.order)
        return x if self.then is None else self.then(x.float())


NameMap = Mapping[str, tuple[Source, ...]]  # canonical name <- sources, concatenated along rows
Names = Callable[[ModelSpec], NameMap]


class Tensors(Protocol):
    """What `bind` needs of a checkpoint."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...


def logical_weights(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by canonical name, in load order."""
    d = spec.dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (spec.vocab, d)}
    if p := spec.positions:
        shapes |= {"position_table": (p.rows, d), "token_types": (p.types, d)}
        shapes |= _norm("embed_norm", p.norm, d)
    for i, layer in enumerate(spec.layers):
        own = f"layers.{i}."
        shapes |= _norm(own + "attn_norm", layer.norm, d)
        mixer = layer.mixer
        parts = _latent(mixer, d) if isinstance(mixer, Mla) else _attention(mixer, d)
        shapes |= {own + name: shape for name, shape in parts.items()}
        if layer.placement == "sandwich":
            shapes |= _norm(own + "attn_post_norm", layer.norm, d)
        if layer.placement != "parallel":
            shapes |= _norm(own + "ffn_norm", layer.norm, d)
        ffn = layer.ffn
        parts = _experts(ffn, d) if isinstance(ffn, MoeFfn) else _ffn(ffn, d)
        shapes |= {own + name: shape for name, shape in parts.items()}
        if layer.placement == "sandwich":
            shapes |= _norm(own + "ffn_post_norm", layer.norm, d)
    if spec.final_norm is not None:
        shapes |= _norm("final_norm", spec.final_norm, d)
    if isinstance(spec.head, HeadSpec):
        if not spec.head.tied:
            shapes["head"] = (spec.vocab, d)
        if spec.head.bias:
            shapes["head_bias"] = (spec.vocab,)
    return shapes


Shapes = dict[str, tuple[int, ...]]


def _norm(name: str, norm: NormSpec, dim: int) -> Shapes:
    bias = isinstance(norm, LayerNorm) and norm.bias
    return {name: (dim,), **({f"{name}_bias": (dim,)} if bias else {})}


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    return {name: (rows, columns), **({f"{name}_bias": (rows,)} if bias else {})}


def _attention(a: Attention, dim: int) -> Shapes:
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes: Shapes = {}
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes |= _linear(name, rows, dim, name in a.biases)
    if a.qk_norm is not None:
        shared = a.qk_norm.over == "head"
        shapes["q_norm"] = (a.head_dim if shared else q,)
        shapes["k_norm"] = (a.head_dim if shared else kv,)
    if a.sinks:
        shapes["sinks"] = (a.heads,)
    return shapes | _linear("o", dim, q, "o" in a.biases)


def _ffn(f: GatedFfn | PlainFfn, dim: int) -> Shapes:
    gate = _linear("gate", f.width, dim, f.bias) if isinstance(f, GatedFfn) else {}
    return gate | _linear("up", f.width, dim, f.bias) | _linear("down", dim, f.width, f.bias)


def _latent(a: Mla, dim: int) -> Shapes:
    query, rotary = a.heads * a.head_dim, a.rope.rotary_dim
    if a.q_latent is None:
        shapes: Shapes = {"q": (query, dim)}
    else:
        shapes = _linear("q_a", a.q_latent, dim, a.bias)
        shapes |= {"q_a_norm": (a.q_latent,), "q_b": (query, a.q_latent)}
    if a.form == "plain":
        shapes |= _linear("kv_a", a.latent, dim, a.bias) | _linear("k_rope", rotary, dim, a.bias)
        shapes["kv_a_norm"] = (a.latent,)
        shapes["kv_b"] = (a.heads * (a.nope + a.value), a.latent)
    else:
        shapes |= _linear("kv_a", a.latent + rotary, dim, a.bias)
        shapes["kv_a_norm"] = (a.latent,)
        shapes["k_up"] = (a.heads, a.latent, a.nope)
        shapes["v_up"] = (a.heads, a.value, a.latent)
    return shapes | _linear("o", dim, a.heads * a.value, a.bias)


def _experts(f: MoeFfn, dim: int) -> Shapes:
    """The matrices of all experts are one weight [E, rows, columns], their biases one vector."""
    shapes = _linear("router", f.experts, dim, f.router.bias)
    if f.router.correction:
        shapes["router_correction"] = (f.experts,)
    for name, rows, columns in (
        ("experts_gate_up", 2 * f.width, dim),
        ("experts_down", dim, f.width),
    ):
        shapes[name] = (f.experts, rows, columns)
        if f.bias:
            shapes[f"{name}_bias"] = (f.experts * rows,)
    if f.shared is not None:
        width = f.shared.width
        shapes |= {"shared_gate": (width, dim), "shared_up": (width, dim)}
        shapes["shared_down"] = (dim, width)
        if f.shared.gated:
            shapes["shared_router"] = (1, dim)
    return shapes


# Modules of the Hugging Face names that most families share, by canonical weight.
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "layer": "model.layers.{i}",
    "attn_norm": "input_layernorm",
    **{n: f"self_attn.{n}_proj" for n in "qkvo"},
    **{f"{n}_norm": f"self_attn.{n}_norm" for n in "qk"},
    "ffn_norm": "post_attention_layernorm",
    **{n: f"mlp.{n}_proj" for n in ("gate", "up", "down")},
    "final_norm": "model.norm",
    "head": "lm_head",
}
Transform = Callable[[torch.Tensor], torch.Tensor]
Packing = Callable[[ModelSpec, int, str], tuple[Source, ...] | None]


def named(
    modules: Mapping[str, str], packing: Packing | None = None, norms: Transform | None = None
) -> Names:
    """A name map from modules: `<module>.weight`, and `<module>.bias` for the bias of a weight;
    those of a layer under `modules["layer"]`. `packing(spec, layer, weight)` gives the sources of
    what is stored in another way, with tensor names that start after the layer's; None leaves it
    to the modules. `norms` is applied to the weights of all norms."""

    def names(spec: ModelSpec) -> NameMap:
        result: dict[str, tuple[Source, ...]] = {}
        for name in logical_weights(spec):
            prefix, index, part = "", -1, name
            if name.startswith("layers."):
                _, number, part = name.split(".", 2)
                index = int(number)
                prefix = modules["layer"].format(i=index) + "."
            sources = packing(spec, index, part) if packing else None
            if sources is None:
                module, kind = part.removesuffix("_bias"), "weight"
                if module != part:
                    kind = "bias"
                then = norms if part.endswith("_norm") else None
                sources = (Source(tensor=f"{modules[module]}.{kind}", then=then),)
            result[name] = tuple(replace(s, tensor=prefix + s.tensor) for s in sources)
        return result

    return names


llama_names = named(LLAMA_NAMES)


def packed_rows(tensor: str, sizes: Mapping[str, int], name: str) -> tuple[Source, ...]:
    """The rows of `name` in a tensor that stacks several weights, in the order of `sizes`."""
    start = 0
    for part, size in sizes.items():
        if part == name:
            return (Source(tensor=tensor, rows=(start, start + size)),)
        start += size
    raise KeyError(name)


def packed(qkv: str | None = None, gate_up: str | None = None) -> Packing:
    """`Packing` of modules that stack q, k, v (with their biases) and gate, up."""

    def packing(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
        base = part.removesuffix("_bias")
        kind = "weight" if base == part else "bias"
        if qkv and base in ("q", "k", "v"):
            a = spec.layers[layer].mixer
            assert isinstance(a, Attention)
            q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
            return packed_rows(f"{qkv}.{kind}", {"q": q, "k": kv, "v": kv}, base)
        if gate_up and base in ("gate", "up"):
            ffn = spec.layers[layer].ffn
            assert isinstance(ffn, GatedFfn)
            width = ffn.width
            return packed_rows(f"{gate_up}.{kind}", {"gate": width, "up": width}, base)
        return None

    return packing


def first_of(*packings: Packing) -> Packing:
    """The sources of the first packing that knows the weight."""

    def packing(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
        found = (p(spec, layer, part) for p in packings)
        return next((sources for sources in found if sources is not None), None)

    return packing


def expert_modules(gate: str, up: str, down: str) -> Packing:
    """`Packing` of experts stored one by one: names of their modules, with `{e}`."""

    def packing(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
        modules = {"experts_gate_up": (gate, up), "experts_down": (down,)}.get(part)
        ffn = spec.layers[layer].ffn
        if modules is None or not isinstance(ffn, MoeFfn):
            return None
        return tuple(
            Source(tensor=f"{module.format(e=e)}.weight")
            for e in range(ffn.experts)
            for module in modules
        )

    return packing


def latent_projections(down: str, up: str) -> Packing:
    """`Packing` of what makes keys and values by way of a latent. Module `down` [C + R, dim]: the
    latent, then the rotary key. Module `up` [H (X + V), C]: per head the rows of its key, then
    those of its value; in the absorbed form the key's half is used from the other side, in the
    plain form the keys of all heads come before the values."""

    def packing(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
        a = spec.layers[layer].mixer
        if not isinstance(a, Mla):
            return None
        base = part.removesuffix("_bias")
        if a.form == "plain" and base in ("kv_a", "k_rope"):
            kind = "weight" if base == part else "bias"
            rows = {"kv_a": a.latent, "k_rope": a.rope.rotary_dim}
            return packed_rows(f"{down}.{kind}", rows, base)
        tensor, view = f"{up}.weight", (a.heads, a.nope + a.value, a.latent)
        key = Source(tensor=tensor, view=view, part=(0, a.nope))
        value = Source(tensor=tensor, view=view, part=(a.nope, a.nope + a.value))
        turned = replace(key, order=(0, 2, 1))
        return {"k_up": (turned,), "v_up": (value,), "kv_b": (key, value)}.get(part)

    return packing


# As the exporters of quantized checkpoints name them.
KV_SCALE = re.compile(r".*\.([kv]_scale|kv_scale|[kv]_proj\.([kv]_scale|output_scale))")


def bind(
    spec: ModelSpec, names: NameMap, tensors: Tensors, unused: Iterable[str]
) -> tuple[str, ...]:
    """Raise unless the map covers the spec exactly and the checkpoint covers the map exactly.
    `unused`: patterns of tensors that may be left over; those that are, sorted, are returned.
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
        try:
            parts = [_part_shape(s, tensors.shape(s.tensor)) for s in sources]
        except RuntimeError:  # a view that the tensor does not have
            parts = [(0,)]
        sizes = [math.prod(p) for p in parts]
        exact = all(
            bool(source.view)
            or part == shapes[name]
            or (len(parts) > 1 and part[1:] == shapes[name][len(shapes[name]) - len(part) + 1 :])
            for source, part in zip(sources, parts, strict=False)
        )
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
            if KV_SCALE.fullmatch(tensor):
                raise CompileError(
                    f"tensor {tensor} is a scale of the KV cache, and pages are stored without "
                    "scales; compile a checkpoint without KV scales, with kv=fp8_e4m3 if pages "
                    "shall be fp8"
                )
            raise CompileError(
                f"tensor {tensor} {list(tensors.shape(tensor))} is not used by family "
                f"{spec.family}; the checkpoint holds more than the model"
            )
        whole = math.prod(tensors.shape(tensor))
        if tensor in taken and taken[tensor] != whole:
            raise ProgramError(
                f"family {spec.family}: {taken[tensor]} of {whole} elements of {tensor} are used"
            )
    return tuple(sorted(set(tensors.names()) - taken.keys()))


def _part_shape(source: Source, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape after `Source.apply`, without data."""
    return tuple(source.apply(torch.empty(shape, device="meta")).shape)
