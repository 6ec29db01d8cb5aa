"""The design of an artifact: everything that is decided before weights are stored.

Comes in: a model's spec, a resolved config, and which weights hold bfloat16 numbers only (on CPUs
float32 programs store those in half the bytes). Goes out: the fused program, stored forms, arena
layouts, one verified launch plan per bucket and their static costs. Besides these only the tuning
records (`config.records`) change it: `inspect verify` calls it again with what the manifest says
and the same records, and compares. Called by the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import kernels.cpu.register
import kernels.cuda.register  # noqa: F401  (fills KERNELS)
from compiler import report
from compiler.check_plan import ArenaSizes, check_plan
from compiler.families.spec import ModelSpec
from compiler.fuse import fuse
from compiler.lower import Node, label, lower
from compiler.maxima import bucket_program, hand_on_maxima
from compiler.memory import state_layout, weights_layout
from compiler.model import StepShape, build
from compiler.precision import activations, linear_inputs
from compiler.program import Program, verify
from compiler.quantize import register  # noqa: F401  (fills SCHEMES)
from compiler.quantize.scheme import SCHEMES, storage_formats
from compiler.record import Addresses, record
from compiler.store import StoredWeight, narrowed, stored_weights, weight_formats
from compiler.tuned import NO_RECORDS, Records, load_records
from conf.schema import CompileConfig
from kernels.cpu.layout import WIDENED
from kernels.cuda.build import build_cuda
from kernels.launch import Binary, Source
from runtime.artifact import Bucket, LaunchPlan, StateLayout, TensorEntry, node_kind

EDITS_BEYOND_CONTEXT = 2048  # per step: a whole prompt marked as seen, and a full logit_bias


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """`tensors` have offsets but no checksums yet. `binaries` and `images` are empty on CPU, where
    the native libraries hold every kernel. `fallbacks`: label (layers as `*`) and bucket of the
    calls of a CUDA target that no tuning record covers, chosen by heuristic."""

    spec: ModelSpec
    shape: StepShape
    program: Program
    formats: Mapping[str, str]  # of the logical weights
    weights: tuple[StoredWeight, ...]
    tensors: tuple[TensorEntry, ...]
    state: StateLayout
    state_offsets: Mapping[str, int]
    buckets: tuple[Bucket, ...]
    plans: Mapping[str, LaunchPlan]
    costs: Mapping[str, Mapping[str, int]]
    work_bytes: int
    io_bytes: int
    target: str
    binaries: Mapping[Source, Binary]
    images: Mapping[str, bytes]  # sha256 -> cubin
    fallbacks: tuple[tuple[str, str], ...]

    @property
    def weights_bytes(self) -> int:
        return self.tensors[-1].offset + self.tensors[-1].size

    @property
    def widened(self) -> tuple[str, ...]:
        """Logical weights that are stored as bfloat16 and computed with in float32."""
        return tuple(name for name, format in self.formats.items() if format == WIDENED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A design before kernels are chosen."""

    shape: StepShape
    program: Program
    formats: Mapping[str, str]
    weights: tuple[StoredWeight, ...]
    tensors: tuple[TensorEntry, ...]
    state: StateLayout
    state_offsets: Mapping[str, int]
    buckets: tuple[Bucket, ...]

    @property
    def weights_bytes(self) -> int:
        return self.tensors[-1].offset + self.tensors[-1].size

    @property
    def addresses(self) -> Addresses:
        return Addresses(weights={t.name: t.offset for t in self.tensors}, state=self.state_offsets)


InBfloat16 = Callable[[str], bool]  # whether a logical weight holds bfloat16 numbers only


def unknown(name: str) -> bool:
    """Of weights that are not there: they are stored as if none did."""
    return False


def draft(spec: ModelSpec, config: CompileConfig, in_bfloat16: InBfloat16 = unknown) -> Draft:
    assert config.shape.context is not None, "the config is resolved"
    shape = StepShape(
        slots=config.shape.max_seqs,
        edits=config.shape.context + EDITS_BEYOND_CONTEXT,
        page_size=config.kv.page_size,
        kv_dtype=config.kv.dtype,
        context=config.shape.context,
    )
    program = verify(fuse(build(spec, shape)))
    if config.target.kind == "cuda":
        program = verify(activations(program, config.dtype))
    formats = storage_formats(
        spec,
        dtype=config.dtype,
        scheme=config.quant.scheme,
        group=config.quant.group_size,
        head=config.quant.head,
    )
    if config.target.kind == "cpu":
        formats = narrowed(program, formats, in_bfloat16)
    if config.quant.scheme != "none":
        x_format = SCHEMES[config.quant.scheme].x_format
        program = verify(linear_inputs(program, formats, x_format))
    weights = stored_weights(program, formats, config.target.kind)
    program = verify(hand_on_maxima(program))  # later: the order of the weights is their first use
    state, state_offsets = state_layout(program, shape)
    return Draft(
        shape=shape,
        program=program,
        formats=formats,
        weights=weights,
        tensors=weights_layout([array for weight in weights for array in weight.arrays]),
        state=state,
        state_offsets=state_offsets,
        buckets=choose_buckets(config),
    )


def design(spec: ModelSpec, config: CompileConfig, in_bfloat16: InBfloat16 = unknown) -> Design:
    target, base = config.target.kind, draft(spec, config, in_bfloat16)
    program, weights, buckets = base.program, base.weights, base.buckets
    by_name = {weight.name: weight for weight in weights}
    records = load_records(config.target.name, config.records) if target == "cuda" else NO_RECORDS
    nodes = {b.name: nodes_of(program, weights, b, target, records) for b in buckets}
    binaries, images = binaries_of(nodes, config)
    plans: dict[str, LaunchPlan] = {}
    work_bytes = 0
    for bucket in buckets:
        plans[bucket.name], work = record(
            program, nodes[bucket.name], bucket, base.addresses, binaries
        )
        work_bytes = max(work_bytes, work)
    made = Design(
        spec=spec,
        shape=base.shape,
        program=program,
        formats=base.formats,
        weights=weights,
        tensors=base.tensors,
        state=base.state,
        state_offsets=base.state_offsets,
        buckets=buckets,
        plans=plans,
        costs={name: report.step_cost(made, by_name) for name, made in nodes.items()},
        work_bytes=work_bytes,
        io_bytes=max(plan.header.io_bytes for plan in plans.values()),
        target=target,
        binaries=binaries,
        images=images,
        fallbacks=guessed(nodes),
    )
    for bucket in buckets:
        check_plan(plans[bucket.name], program, nodes[bucket.name], arena_sizes(made), binaries)
    return made


def guessed(nodes: Mapping[str, Sequence[Node]]) -> tuple[tuple[str, str], ...]:
    """`Design.fallbacks` of the nodes of every bucket."""
    return tuple(
        dict.fromkeys(
            (node_kind(label(node.call)), bucket)
            for bucket, made in nodes.items()
            for node in made
            if node.guessed
        )
    )


def nodes_of(
    program: Program,
    weights: tuple[StoredWeight, ...],
    bucket: Bucket,
    target: str,
    records: Records = NO_RECORDS,
) -> tuple[Node, ...]:
    formats = weight_formats(weights)
    return lower(bucket_program(program, bucket), bucket, formats, target, records)


def binaries_of(
    nodes: Mapping[str, tuple[Node, ...]], config: CompileConfig
) -> tuple[dict[Source, Binary], dict[str, bytes]]:
    """Cubins of every launch, built now or taken from the cache; none for the CPU."""
    sources = [
        launch.source
        for made in nodes.values()
        for node in made
        for launch in node.launches
        if launch.source is not None
    ]
    if not sources:
        return {}, {}
    assert config.target.arch is not None, "a CUDA target names its architecture"
    built = build_cuda(sources, Path(config.cache), config.target.arch)
    return (
        {source: binary for source, (binary, _) in built.items()},
        {binary.sha256: image for binary, image in built.values()},
    )


def arena_sizes(made: Design) -> ArenaSizes:
    return ArenaSizes(
        weights=made.weights_bytes,
        state=made.state_offsets,
        pages_offset=made.state.pages_offset,
        work=made.work_bytes,
        fields={tensor.name: (tensor.offset, tensor.size) for tensor in made.tensors},
    )


# Sequences of the decode buckets and tokens of the mixed ones of a CUDA target: grids are sized for
# the bucket, so a step should not need more than about one and a half times its size.
DECODE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
MIXED_SIZES = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def choose_buckets(config: CompileConfig) -> tuple[Bucket, ...]:
    """On CPU few: kernels read the live counts, so a step in a larger bucket costs its live tokens;
    what grows with the bucket is the upload of the page table. On CUDA a graph each."""
    assert config.shape.context is not None
    tokens, seqs = config.shape.max_tokens, min(config.shape.max_seqs, config.shape.max_tokens)
    pages = -(-config.shape.context // config.kv.page_size)
    if config.target.kind != "cuda":
        sizes = sorted({min(size, tokens) for size in (1, 8, seqs, tokens)})
        return tuple(Bucket(name=f"t{n}", tokens=n, seqs=min(n, seqs), pages=pages) for n in sizes)
    decode = sorted({*(n for n in DECODE_SIZES if n < seqs), seqs})
    mixed = sorted({*(n for n in MIXED_SIZES if n < tokens), tokens})
    return (
        *(Bucket(name=f"d{n}", tokens=n, seqs=n, pages=pages, kind="decode") for n in decode),
        *(Bucket(name=f"t{n}", tokens=n, seqs=min(n, seqs), pages=pages) for n in mixed),
    )
