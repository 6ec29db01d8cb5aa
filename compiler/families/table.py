"""The supported families as a table: what each is made of, and its named shapes.

Derived from the specs of the named shapes (`conf/model`), so it cannot say what the compiler does
not do. Called by `python -m compiler.families`; docs/models.md holds its output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import compiler.families.register  # noqa: F401  (fills FAMILIES)
from compiler.checkpoint import ConfigReader
from compiler.embedding import as_configured
from compiler.families.family import FAMILIES, Family, family_of
from compiler.families.spec import (
    Attention,
    HeadSpec,
    LayerSpec,
    Mla,
    ModelSpec,
    MoeFfn,
    PlainFfn,
    PoolSpec,
    RmsNorm,
    RopeSpec,
)
from conf.load import group_values
from conf.options import group_choices
from conf.schema import ModelConfig

ACTS = {
    "silu": "SwiGLU",
    "gelu": "GeGLU",
    "gelu_tanh": "GeGLU (tanh)",
    "silu_clamped": "clamped SwiGLU",
}
COLUMNS = ("family", "architectures", "norms", "attention", "positions", "ffn", "scales and head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One family; `cells` as COLUMNS, `shapes`: named shapes with their parameters."""

    cells: tuple[str, ...]
    shapes: tuple[str, ...]


def named_shapes() -> list[str]:
    """All of conf/model but the two that stand for a checkpoint."""
    return [name for name in group_choices("model") if name not in ("hf", "tiny")]


def read_shape(name: str, mla: str = "auto") -> tuple[Family, ModelSpec]:
    """A named shape of conf/model, `mla` as in its options."""
    return shape_of(ModelConfig(**group_values("model", name), mla=mla))


def shape_of(options: ModelConfig) -> tuple[Family, ModelSpec]:
    """A named shape as its options have it."""
    where = f"model={options.name}"
    reader = ConfigReader(options.config, where)
    family = family_of(reader)
    spec = family.read(reader)
    return family, as_configured(spec, family, options, None, options.config, where)


def rows() -> list[Row]:
    """One per family, in the order of their names."""
    shapes: dict[str, dict[str, ModelSpec]] = {name: {} for name in FAMILIES}
    for name in named_shapes():
        family, spec = read_shape(name)
        shapes[family.name][name] = spec
    return [_row(name, shapes[name]) for name in sorted(FAMILIES)]


def _row(name: str, shapes: dict[str, ModelSpec]) -> Row:
    family = FAMILIES[name]
    layers = list(dict.fromkeys(layer for spec in shapes.values() for layer in spec.layers))
    return Row(
        cells=(
            name,
            _joined((*family.architectures, *family.bases)),
            _joined(_norm(layer) for layer in layers),
            _joined(axis for layer in layers for axis in _attention(layer.mixer)),
            _joined(
                "learned" if spec.positions else _positions(layer.mixer)
                for spec in shapes.values()
                for layer in spec.layers
            ),
            _joined(_ffn(layer) for layer in layers),
            _joined(axis for spec in shapes.values() for axis in _scales(spec)),
        ),
        shapes=tuple(f"{n} ({_size(spec.parameters())})" for n, spec in shapes.items()),
    )


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(part for part in parts if part)) or "-"


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 9.995e8 else f"{parameters / 1e6:.3g} M"


def _norm(layer: LayerSpec) -> str:
    norm = layer.norm
    kind = "RMS" if isinstance(norm, RmsNorm) else "LayerNorm" + (" + bias" * norm.bias)
    return f"{kind} {layer.placement}"


def _attention(m: Attention | Mla) -> Iterable[str]:
    if isinstance(m, Mla):
        yield "MLA"
        yield "query latent" if m.q_latent else ""
        return
    yield "MHA" if m.kv_heads == m.heads else "MQA" if m.kv_heads == 1 else "GQA"
    yield "" if m.causal else "both ways"
    yield f"bias {''.join(m.biases)}" if m.biases else ""
    if m.qk_norm:
        over = {"head": "per head", "heads": "per head, own weights", "row": "whole width"}
        yield f"q, k norm {over[m.qk_norm.over]}"
    yield f"window {m.window}" if m.window else ""
    yield f"softcap {m.softcap:g}" if m.softcap else ""
    yield f"clip {m.clip:g}" if m.clip else ""
    yield "sinks" if m.sinks else ""
    yield "logn" if m.logn else ""


def _positions(m: Attention | Mla) -> str:
    if isinstance(m, Attention) and m.rope is None:
        return "alibi" if m.alibi else "none"
    rope = m.rope
    assert isinstance(rope, RopeSpec)
    share = 1.0 if isinstance(m, Mla) else rope.rotary_dim / m.head_dim
    kind = "rope" if share == 1 else f"rope of {share:g} of a head"
    if rope.interleaved:
        kind += " in neighbouring pairs"
    return kind + (f" by length ({type(rope.by_length).__name__})" if rope.by_length else "")


def _ffn(layer: LayerSpec) -> str:
    f = layer.ffn
    bias = " + bias" if f.bias else ""
    if isinstance(f, PlainFfn):
        return f.act.replace("_", " ") + bias
    if not isinstance(f, MoeFfn):
        return ACTS[f.act] + bias
    r = f.router
    parts = [f"{f.experts} experts, top {f.top_k}, {ACTS[f.act]}{bias}", r.score]
    parts += ["renormalised"] * r.renormalise + ["correction"] * r.correction
    parts += [f"{r.kept_groups} of {r.groups} groups"] if r.groups > 1 else []
    if f.shared is not None:
        parts.append("gated shared expert" if f.shared.gated else "shared experts")
    return f"[{'; '.join(parts)}]"


def _scales(spec: ModelSpec) -> Iterable[str]:
    yield "embedding scaled" if spec.embed_scale != 1 else ""
    yield "branches scaled" if any(layer.residual_scale != 1 for layer in spec.layers) else ""
    if isinstance(spec.head, PoolSpec):
        yield f"pooled ({spec.head.pooling})"
        return
    head: HeadSpec = spec.head
    yield "logits scaled" if head.scale != 1 else ""
    yield f"logit softcap {head.softcap:g}" if head.softcap else ""
    yield "tied" if head.tied else "untied"
    yield "head bias" if head.bias else ""


def markdown(table: list[Row]) -> str:
    """One table of axes, one of shapes."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row.cells) + " |" for row in table]
    lines += ["", "| family | named shapes (`model=<name>`) |", "|---|---|"]
    lines += [f"| {row.cells[0]} | {', '.join(row.shapes) or '-'} |" for row in table]
    return "\n".join(lines) + "\n"


def text(table: list[Row]) -> str:
    """For a terminal: one paragraph per family."""
    out = []
    for row in table:
        out.append(row.cells[0])
        pairs = list(zip(COLUMNS[1:], row.cells[1:], strict=True))
        for column, cell in [*pairs, ("shapes", ", ".join(row.shapes) or "-")]:
            out.append(f"  {column:16} {cell}")
    return "\n".join(out) + "\n"
