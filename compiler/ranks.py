"""What one rank of a tensor-parallel model holds: the rule by which each part is cut, as a smaller
spec, and the bytes that follow.

The rules (column: rows of the weight are cut; row: its columns, and the results are summed):

    q, k, v, gate, up, q_b, the latent's up-projections    column, by heads or by ffn width
    o, down, experts' down                                 row; their biases are added once
    embedding, head                                        rows of the vocabulary, padded to even
    one number or vector per head (sinks, slopes, norms)   with the heads
    norms, router, projections to a latent                 on every rank
    keys and values                                        with their heads; where there are fewer
                                                           kv heads than ranks, each on several
    latents                                                on every rank

Pure: reads no weight, and makes no artifact. Called by `python -m compiler.families`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import structs

from compiler.errors import CompileError
from compiler.families.names import logical_weights
from compiler.families.spec import (
    Attention,
    GatedFfn,
    LayerSpec,
    Mla,
    ModelSpec,
    MoeFfn,
    PlainFfn,
)
from compiler.model import StepShape, page_bytes
from compiler.quantize.scheme import parse_format

FLOAT_BYTES = {"float32": 4, "bfloat16": 2}


def rank_spec(spec: ModelSpec, tp: int) -> ModelSpec:
    """The sizes of rank 0 of `tp`; CompileError where a part cannot be cut evenly."""
    layers = {layer: _layer(layer, tp) for layer in dict.fromkeys(spec.layers)}
    return structs.replace(
        spec,
        vocab=-(-spec.vocab // tp),
        layers=tuple(layers[layer] for layer in spec.layers),
    )


def rank_fit(
    spec: ModelSpec, formats: Mapping[str, str], shape: StepShape, tp: int
) -> dict[str, int]:
    """Bytes on each rank: stored weights, and keys and values of one token. `formats`: storage
    format by logical weight (`quantize.scheme.storage_formats`)."""
    part = rank_spec(spec, tp)
    weights = sum(
        stored_bytes(dims, formats.get(name, "float32"), name)
        for name, dims in logical_weights(part).items()
    )
    return {"weights": weights, "kv_token": page_bytes(part, shape) // shape.page_size}


def stored_bytes(dims: tuple[int, ...], format: str, name: str) -> int:
    """Of one weight, without what a device's layout adds to fill its last tile."""
    count = math.prod(dims)
    quantized = parse_format(format)
    if quantized is None:
        return count * FLOAT_BYTES[format]
    scheme, group = quantized
    if group and dims[-1] % group:
        raise CompileError(
            f"quant.group_size={group} does not divide the {dims[-1]} inputs of {name} that are "
            "left on a rank; use a smaller group or fewer ranks"
        )
    return count * scheme.bits // 8 + count // dims[-1] * scheme.scale_bytes(dims[-1], group)


def _layer(layer: LayerSpec, tp: int) -> LayerSpec:
    m, f = layer.mixer, layer.ffn
    heads = _cut(m.heads, tp, "heads")
    if isinstance(m, Mla):
        mixer: Attention | Mla = structs.replace(m, heads=heads)
    else:
        if m.kv_heads % tp and tp % m.kv_heads:
            raise CompileError(
                f"{m.kv_heads} kv heads can be neither cut into nor repeated on {tp} ranks"
            )
        slopes = m.alibi[:heads] if m.alibi is not None else None
        kv_heads = max(m.kv_heads // tp, 1)
        mixer = structs.replace(m, heads=heads, kv_heads=kv_heads, alibi=slopes)
    width = _cut(f.width, tp, "ffn columns")
    ffn: GatedFfn | PlainFfn | MoeFfn = structs.replace(f, width=width)
    if isinstance(ffn, MoeFfn) and ffn.shared is not None:
        shared = _cut(ffn.shared.width, tp, "columns of the shared experts")
        ffn = structs.replace(ffn, shared=structs.replace(ffn.shared, width=shared))
    return structs.replace(layer, mixer=mixer, ffn=ffn)


def _cut(count: int, tp: int, what: str) -> int:
    if count % tp:
        raise CompileError(f"{count} {what} cannot be cut into {tp} equal parts; use fewer ranks")
    return count // tp
