"""The design of an artifact: everything that is decided before a weight is read.

Comes in: a model's spec and a resolved config. Goes out: the fused program, stored forms, arena
layouts, one verified launch plan per bucket and their static costs. Pure: `inspect verify` calls
it again with what the manifest says and compares. Called by the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import kernels.cpu.register  # noqa: F401  (fills KERNELS)
from compiler import report
from compiler.check_plan import ArenaSizes, check_plan
from compiler.families.spec import ModelSpec
from compiler.fuse import fuse
from compiler.lower import Node, lower
from compiler.memory import state_layout, weights_layout
from compiler.model import StepShape, build
from compiler.program import Program, verify
from compiler.quantize import register  # noqa: F401  (fills SCHEMES)
from compiler.quantize.scheme import storage_formats
from compiler.record import Addresses, bucket_sizes, record
from compiler.store import StoredWeight, stored_weights, weight_formats
from conf.schema import CompileConfig
from runtime.artifact import Bucket, LaunchPlan, StateLayout, TensorEntry

EDITS_BEYOND_CONTEXT = 2048  # per step: a whole prompt marked as seen, and a full logit_bias


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """`tensors` have offsets but no checksums yet."""

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

    @property
    def weights_bytes(self) -> int:
        return self.tensors[-1].offset + self.tensors[-1].size


def design(spec: ModelSpec, config: CompileConfig) -> Design:
    assert config.shape.context is not None, "the config is resolved"
    shape = StepShape(
        slots=config.shape.max_seqs,
        edits=config.shape.context + EDITS_BEYOND_CONTEXT,
        page_size=config.kv.page_size,
        kv_dtype=config.kv.dtype,
        context=config.shape.context,
    )
    program = verify(fuse(build(spec, shape)))
    formats = storage_formats(
        spec,
        dtype=config.dtype,
        scheme=config.quant.scheme,
        group=config.quant.group_size,
        head=config.quant.head,
    )
    weights = stored_weights(program, formats)
    tensors = weights_layout([array for weight in weights for array in weight.arrays])
    state, state_offsets = state_layout(program, shape)
    addresses = Addresses(weights={t.name: t.offset for t in tensors}, state=state_offsets)
    plans: dict[str, LaunchPlan] = {}
    costs: dict[str, Mapping[str, int]] = {}
    work_bytes = 0
    by_name = {weight.name: weight for weight in weights}
    buckets = choose_buckets(config)
    for bucket in buckets:
        nodes = nodes_of(program, weights, bucket)
        plans[bucket.name], work = record(program, nodes, bucket, addresses)
        costs[bucket.name] = report.step_cost(nodes, by_name)
        work_bytes = max(work_bytes, work)
    made = Design(
        spec=spec,
        shape=shape,
        program=program,
        formats=formats,
        weights=weights,
        tensors=tensors,
        state=state,
        state_offsets=state_offsets,
        buckets=buckets,
        plans=plans,
        costs=costs,
        work_bytes=work_bytes,
        io_bytes=max(plan.header.io_bytes for plan in plans.values()),
    )
    for bucket in buckets:
        nodes = nodes_of(program, weights, bucket)
        check_plan(plans[bucket.name], program, nodes, arena_sizes(made))
    return made


def nodes_of(
    program: Program, weights: tuple[StoredWeight, ...], bucket: Bucket
) -> tuple[Node, ...]:
    return lower(program, bucket_sizes(bucket), weight_formats(weights), "cpu")


def arena_sizes(made: Design) -> ArenaSizes:
    return ArenaSizes(
        weights=made.weights_bytes,
        state=made.state_offsets,
        pages_offset=made.state.pages_offset,
        work=made.work_bytes,
        fields={tensor.name: (tensor.offset, tensor.size) for tensor in made.tensors},
    )


def choose_buckets(config: CompileConfig) -> tuple[Bucket, ...]:
    """Few: kernels read the live counts, so a step in a larger bucket costs its live tokens. What
    grows with the bucket is the upload of the page table."""
    assert config.shape.context is not None
    tokens, seqs = config.shape.max_tokens, min(config.shape.max_seqs, config.shape.max_tokens)
    pages = -(-config.shape.context // config.kv.page_size)
    sizes = sorted({min(size, tokens) for size in (1, 8, seqs, tokens)})
    return tuple(
        Bucket(name=f"t{size}", tokens=size, seqs=min(size, seqs), pages=pages) for size in sizes
    )
