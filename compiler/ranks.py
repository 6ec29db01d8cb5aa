"""What one rank of a tensor-parallel model holds: the rule by which each part is cut, as a smaller
spec, and the bytes that follow.

The rules (column: rows of the weight are cut; row: its columns, and the results are summed):

    q, k, v, gate, up, q_b, a latent's up-projections      column, by heads or by ffn width
    o, down, experts' down                                 row; their biases are added once
    embedding, head                                        rows of the vocabulary, padded to even
    one number or vector per head (sinks, slopes, norms)   with the heads
    norms, router, projections to a latent                 on every rank
    keys and values                                        with their heads; where there are fewer
                                                           kv heads than ranks, each on several
    latents (of the absorbed form), rotary keys of both    on every rank

Pure: reads no weight, and makes no artifact. Called by `python -m compiler.families`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from msgspec import structs

from compiler import report
from compiler.design import InBfloat16, draft, nodes_of, unknown
from compiler.errors import CompileError
from compiler.families.spec import (
    Attention,
    GatedFfn,
    LayerSpec,
    Mla,
    ModelSpec,
    MoeFfn,
    PlainFfn,
)
from compiler.lower import Node, bucket_sizes
from compiler.memory import Block, io_layout, work_blocks
from compiler.program import Program
from compiler.record import work_layout
from compiler.tuned import NO_RECORDS, load_records
from conf.schema import CompileConfig


def rank_spec(spec: ModelSpec, tp: int, *, whole_vocab: bool = False) -> ModelSpec:
    """The sizes of rank 0 of `tp`; CompileError where a part cannot be cut evenly."""
    layers = {layer: _layer(layer, tp) for layer in dict.fromkeys(spec.layers)}
    return structs.replace(
        spec,
        vocab=spec.vocab if whole_vocab else -(-spec.vocab // tp),
        layers=tuple(layers[layer] for layer in spec.layers),
    )


def rank_fit(
    spec: ModelSpec, config: CompileConfig, tp: int, in_bfloat16: InBfloat16 = unknown
) -> dict[str, int]:
    """Bytes by arena on each rank (`report.fit`), at one rank those of the artifact. Of more, the
    sampler sees the logits of the whole vocabulary on every rank: its own rows, gathered, and the
    counts and biases of all. What ranks exchange otherwise is summed in place."""
    part, device = draft(rank_spec(spec, tp), config, in_bfloat16), config.target.kind == "cuda"
    all_rows = rank_spec(spec, tp, whole_vocab=True)
    whole = part if tp == 1 else draft(all_rows, config, in_bfloat16)
    records = load_records(config.target.name, config.records) if device else NO_RECORDS
    work = io = 0
    for bucket in part.buckets:
        nodes = [
            nodes_of(base.program, base.weights, bucket, config.target.kind, records)
            for base in (part, whole)
        ]
        blocks = rank_blocks((part.program, whole.program), nodes, bucket_sizes(bucket), tp)
        work = max(work, work_layout(blocks, device)[1])
        io = max(io, io_layout(part.program, bucket_sizes(bucket)).io_bytes)
    return report.fit(part.weights_bytes, whole.state, work, io)


def rank_blocks(
    programs: tuple[Program, Program],
    nodes: Sequence[Sequence[Node]],
    sizes: Mapping[str, int],
    tp: int,
) -> list[Block]:
    """What lives in the work arena of a rank. Of both the rank's own program and that with the
    whole vocabulary, which differ in embedding, head and sampler."""
    calls = programs[0].calls
    sampler = next((i for i, call in enumerate(calls) if call.op == "edit"), len(calls))
    if tp == 1 or sampler == len(calls):
        return work_blocks(programs[0], nodes[0], sizes)
    own = work_blocks(programs[0], nodes[0][:sampler], sizes)
    return own + [
        replace(block, name=f"gathered.{block.name}")
        for block in work_blocks(programs[1], nodes[1], sizes)
        if block.last >= sampler
    ]


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
