"""What single calls and whole steps of a model take on this machine's GPU, with any choice of
kernels.

Comes in: a model's design before kernels are chosen, and candidates. Goes out: seconds, and whether
a candidate computes what the default does. Calls run through the runtime's own launcher as graphs
on rotating buffers, so that no weight is found in the cache. Used by `compiler.tune_worker` and
`bench.gpu.calls`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from compiler.bind import Built, bind, bind_plan
from compiler.design import Draft, nodes_of
from compiler.lower import Node, accepting, bucket_sizes, call_shape, label
from compiler.memory import value_bytes
from compiler.record import record
from compiler.store import StoredWeight, weight_formats
from compiler.tune_inputs import Lengths, lengths, pages_of, step_inputs
from compiler.tuned import Records, call_key
from conf.errors import ConfigError
from kernels.cuda.build import build_cuda
from kernels.cuda.kernel import CudaKernel
from kernels.kernel import CallShape
from kernels.launch import COUNTERS, COUNTERS_BYTES, WORKSPACE, Descriptor, Pointer, Source
from kernels.op import OPS
from kernels.ops.kv import KV_DTYPES, layer_bytes
from runtime.artifact import ARENAS, Bucket
from runtime.device.launcher import Call, Launcher
from runtime.weights_file import itemsize

ALIGN = 256
PATTERN = 0x3C  # every float format reads this byte, repeated, as a small positive number
BLOCK = 1 << 22  # random numbers made at most; a larger array repeats them
ROTATE = 3  # times the second-level cache that a graph's buffers take
MOST_CALLS = 64
GRAPH_S = 1e-3  # device time of a graph of calls, about
TIMED_S = 0.05  # of all its replays, at most
LEAST_ROUNDS = 5
FAR, FAR_S = 2.0, 10e-6  # times the best, and a launch's own time: not worth more replays
COMPARED = 4 << 20  # bytes of an output that are compared at its start, middle and end
# Inputs that say something of other ones, so no random numbers: no row of `_numbers` has larger.
TOLD = {"x_amax": 0.25}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    kernel: CudaKernel
    config: Any

    @classmethod
    def of(cls, node: Node) -> Candidate:
        """What lowering chose for a call of a CUDA target."""
        assert isinstance(node.kernel, CudaKernel)
        return cls(kernel=node.kernel, config=node.config)

    @property
    def name(self) -> str:
        values = ", ".join(f"{k}={v}" for k, v in asdict(self.config).items())
        return f"{self.kernel.name}({values})"

    def entry(self, seconds: float) -> dict[str, Any]:
        us = round(seconds * 1e6, 3)
        return {"kernel": self.kernel.name, "config": asdict(self.config), "us": us}

    def sources(self, shape: CallShape) -> list[Source]:
        launches = self.kernel.launches(shape, self.config)
        return [x.source for x in launches if x.source is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call to measure, as it first appears, with every candidate (the default first)."""

    key: str
    bucket: Bucket
    node: Node
    candidates: tuple[Candidate, ...]


def tasks(base: Draft, buckets: Sequence[Bucket], ops: Sequence[str] = ()) -> Iterator[Task]:
    """Every distinct call of the buckets, in their order."""
    formats, seen = weight_formats(base.weights), set()
    for bucket in buckets:
        for node in nodes_of(base.program, base.weights, bucket, "cuda"):
            shape = call_shape(base.program, node.call, bucket, formats)
            key = call_key(shape)
            if key in seen or (ops and shape.op not in ops):
                continue
            seen.add(key)
            yield Task(key=key, bucket=bucket, node=node, candidates=candidates(node, shape))


def candidates(node: Node, shape: CallShape) -> tuple[Candidate, ...]:
    first = Candidate.of(node)
    kernels = accepting(shape, "cuda", label(node.call))
    rest = (Candidate(kernel=k, config=c) for k in kernels for c in k.candidates(shape))
    return tuple(dict.fromkeys((first, *rest)))


def candidate(task: Task, entry: Mapping[str, Any]) -> Candidate | None:
    """The one of the call's candidates that an entry of the records names."""
    for one in task.candidates:
        if one.kernel.name == entry["kernel"] and asdict(one.config) == entry["config"]:
            return one
    return None


class Meter:
    """`context`: tokens every sequence holds in what is measured."""

    def __init__(
        self,
        launcher: Launcher,
        base: Draft,
        *,
        context: int,
        memory_gib: float,
        rounds: int,
        cache: Path,
        arch: str,
    ) -> None:
        self.launcher, self.base = launcher, base
        self.rounds, self.cache, self.arch = rounds, cache, arch
        self.weights = {weight.name: weight for weight in base.weights}
        self.page = base.shape.page_size
        self.context = min(context, base.shape.context)
        wanted = max(pages_of(lengths(bucket, self.context), self.page) for bucket in base.buckets)
        room = int(launcher.free_memory() * 0.4) // base.state.page_bytes
        self.pool = max(min(wanted, room), 1)
        self.state_bytes = base.state.pages_offset + self.pool * base.state.page_bytes
        self.state = launcher.allocate(self.state_bytes)
        launcher.fill(self.state, base.state.pages_offset, 0)
        pages = self.pool * base.state.page_bytes
        launcher.fill(self.state + base.state.pages_offset, pages, PATTERN)
        self.memory = _Memory(launcher, int(launcher.free_memory() * 0.8), memory_gib)

    def built(self, sources: Sequence[Source]) -> Built:
        return build_cuda(sources, self.cache, self.arch)

    def call(
        self, task: Task, held: Lengths | None = None, inputs: Mapping[str, float] | None = None
    ) -> TimedCall:
        """Buffers for one call; those of an earlier one are given up. `held`: lengths of the
        sequences, else those of a full bucket at `context`; `inputs`: what io inputs are filled
        with instead of a greedy step's."""
        return TimedCall(self, task, held, inputs or {})

    def step(self, bucket: Bucket, records: Records) -> float | None:
        """Median seconds of the bucket's whole step with these choices; None where it does not fit
        into memory."""
        base = self.base
        nodes = nodes_of(base.program, base.weights, bucket, "cuda", records)
        built = self.built([x.source for n in nodes for x in n.launches if x.source is not None])
        binaries = {source: binary for source, (binary, _) in built.items()}
        plan, work = record(base.program, nodes, bucket, base.addresses, binaries)
        tensors = base.tensors[-1]
        places = self.memory.places(tensors.offset + tensors.size, work, plan.header.io_bytes)
        if places is None:
            return None
        weights, scratch, io = places
        held = lengths(bucket, self.context)
        inputs = step_inputs(base.program, bucket, held, self.page, self.pool)
        block = np.zeros(plan.header.io_bytes, np.uint8)
        for f in plan.header.io:
            if not f.output:
                raw = np.ascontiguousarray(inputs[f.name]).view(np.uint8).reshape(-1)
                block[f.offset : f.offset + len(raw)] = raw
        self.launcher.fill(weights, tensors.offset + tensors.size, PATTERN)
        self.launcher.write(io, block)
        self.launcher.fill(scratch, COUNTERS_BYTES, 0)
        bases = dict(zip(("weights", "work", "io"), (weights, scratch, io), strict=True))
        bases["state"] = self.state
        images = {binary.sha256: image for binary, image in built.values()}
        calls = bind_plan(
            self.launcher, plan, binaries.values(), images, [bases[name] for name in ARENAS]
        )
        graph = self.launcher.graph(calls)
        try:
            once = min(self.launcher.seconds(graph, 2, warmup=1))
            return median(self.launcher.seconds(graph, self.rounds_for(once), warmup=0))
        finally:
            graph.close()

    def rounds_for(self, seconds: float) -> int:
        return max(min(self.rounds, int(TIMED_S / max(seconds, 1e-9))), LEAST_ROUNDS)


class _Memory:
    """Device memory for buffers, taken once, filled with PATTERN: shared out anew for every use."""

    def __init__(self, launcher: Launcher, free: int, limit_gib: float) -> None:
        self.size = min(free, int(limit_gib * (1 << 30)))
        self.launcher = launcher
        self.start = launcher.allocate(self.size)
        launcher.fill(self.start, self.size, PATTERN)

    def places(self, *sizes: int) -> list[int] | None:
        """Addresses one after the other, None when they do not fit."""
        places, end = [], 0
        for size in sizes:
            places.append(self.start + end)
            end += -(-max(size, 1) // ALIGN) * ALIGN
        return places if end <= self.size else None


class TimedCall:
    """One call on rotating copies of everything it touches. The first copy has real numbers, for
    the comparison of results; all share the state."""

    def __init__(
        self, meter: Meter, task: Task, held: Lengths | None, inputs: Mapping[str, float]
    ) -> None:
        self.meter, self.task = meter, task
        program, sizes = meter.base.program, bucket_sizes(task.bucket)
        held = held or lengths(task.bucket, meter.context)
        self.inputs = step_inputs(program, task.bucket, held, meter.page, meter.pool, seed=1)
        for name, number in inputs.items():
            self.inputs[name].fill(number)
        self.names = {**task.node.call.ins, **task.node.call.outs}
        self.sizes: dict[str, int] = {}  # "<argument>" or "<argument>.<field>"
        for arg, name in self.names.items():
            value = program.values[name]
            if value.kind == "weight":
                for field, size in _fields(meter.weights[name]).items():
                    self.sizes[f"{arg}.{field}"] = size
            elif value.kind != "state":
                self.sizes[arg] = value_bytes(program, name, sizes)
        shape = task.node.shape
        scratch = max(c.kernel.workspace(shape, c.config) for c in task.candidates)
        self.sizes |= {COUNTERS: COUNTERS_BYTES, WORKSPACE: max(scratch, 1)}
        total = sum(-(-size // ALIGN) * ALIGN for size in self.sizes.values())
        rotate = -(-ROTATE * meter.launcher.gpu.l2 // total)
        self.copies = max(min(rotate, meter.memory.size // total, MOST_CALLS), 1)
        self.places: list[dict[str, int]] = []
        found = meter.memory.places(*list(self.sizes.values()) * self.copies)
        if found is None:
            raise ConfigError(
                f"memory_gib={meter.memory.size / (1 << 30):.1f}: {label(task.node.call)} takes "
                f"{total / (1 << 30):.2f} GiB; give more"
            )
        self.wanted: dict[str, np.ndarray] | None = None  # what the first candidate computes
        for copy in range(self.copies):
            first = copy * len(self.sizes)
            self.places.append(dict(zip(self.sizes, found[first:], strict=False)))
            self.fill(copy)

    def fill(self, copy: int) -> None:
        launcher, places = self.meter.launcher, self.places[copy]
        g = np.random.default_rng(0)
        for key, size in self.sizes.items():
            arg, _, field = key.partition(".")
            if key == COUNTERS:
                launcher.fill(places[key], size, 0)
            elif arg in self.names and self.names[arg] in self.inputs:
                launcher.write(places[key], self.inputs[self.names[arg]])
            elif arg in TOLD:
                launcher.write(places[key], np.full(size // 4, TOLD[arg], np.float32))
            else:
                numbers = _numbers(g, self.dtype(arg, field), size).view(np.uint8)
                for start in range(0, size, len(numbers)):
                    launcher.write(places[key] + start, numbers[: size - start])

    def dtype(self, arg: str, field: str) -> str:
        name = self.names.get(arg)
        value = self.meter.base.program.values.get(name) if name else None
        if value is None:
            return "uint8"
        if value.kind != "weight":
            return value.dtype
        arrays = self.meter.weights[value.name].arrays
        return next(a.dtype for a in arrays if a.name.endswith(f".{field}"))

    def address(self, copy: int, workspace: int) -> Any:
        places, base = self.places[copy], self.meter.base

        def address(slot: Pointer | Descriptor) -> int:
            if slot.arg == WORKSPACE and not workspace:
                return 0
            if slot.arg in (WORKSPACE, COUNTERS):
                return places[slot.arg] + slot.offset
            name = self.names[slot.arg]
            value = base.program.values[name]
            if value.kind == "state":
                return self.meter.state + base.state_offsets[name] + slot.offset
            key = f"{slot.arg}.{slot.field or 'data'}" if value.kind == "weight" else slot.arg
            return places[key] + slot.offset

        return address

    def written_pages(self) -> list[int]:
        """Where the layer lies in pages that the call writes to: those of the first, a middle and
        the last token. None where it writes to none."""
        call, base = self.task.node.call, self.meter.base
        if "kv_slots" not in call.ins:
            return []
        tokens = int(self.inputs["live"][0])
        slots = self.inputs["kv_slots"][[0, tokens // 2, tokens - 1]]
        first = self.meter.state + base.state_offsets["kv"] + call.attrs["layer_offset"]
        pages = sorted({int(slot) // self.meter.page for slot in slots})
        return [first + page * base.state.page_bytes for page in pages]

    def results(self, calls: Sequence[Call]) -> dict[str, np.ndarray]:
        """What the first copy's outputs, and some of the pages written to, hold after one run."""
        launcher, program = self.meter.launcher, self.meter.base.program
        outs = {
            arg: name
            for arg, name in self.task.node.call.outs.items()
            if program.values[name].kind != "state"
        }
        for arg in outs:
            launcher.fill(self.places[0][arg], self.sizes[arg], 0)
        attrs, pages = dict(self.task.node.call.attrs), self.written_pages()
        for at in pages:
            launcher.fill(at, layer_bytes(attrs), PATTERN)
        graph = launcher.graph(calls)
        try:
            launcher.run(graph)
        finally:
            graph.close()
        found = {}
        for arg, name in outs.items():
            start, size = self.places[0][arg], self.sizes[arg]
            parts = [(0, size)]
            if size > 3 * COMPARED:
                middle = (size // 2) // ALIGN * ALIGN
                parts = [(at, COMPARED) for at in (0, middle, size - COMPARED)]
            raw = np.concatenate([launcher.read(start + at, count) for at, count in parts])
            found[arg] = _widened(raw, program.values[name].dtype)
        if pages:
            raw = np.concatenate([launcher.read(at, layer_bytes(attrs)) for at in pages])
            found["kv"] = torch.from_numpy(raw).view(KV_DTYPES[attrs["kv_dtype"]]).float().numpy()
        return found

    def calls(self, candidate: Candidate) -> list[list[Call]]:
        """The candidate's launches on every copy."""
        meter, shape = self.meter, self.task.node.shape
        launches = candidate.kernel.launches(shape, candidate.config)
        built = meter.built(candidate.sources(shape))
        size = candidate.kernel.workspace(shape, candidate.config)
        return [
            [bind(meter.launcher, x, built, self.address(copy, size)) for x in launches]
            for copy in range(self.copies)
        ]

    def differs(self, calls: Sequence[Sequence[Call]]) -> str | None:
        """Why these calls do not compute what the first ones asked about did; None if they do."""
        results = self.results(calls[0])
        if self.wanted is None:
            self.wanted = results
            return None
        return _differs(self.task, results, self.wanted)

    def seconds(self, copies: Sequence[Sequence[Call]], best: float = math.inf) -> float:
        """Median device time of one call: a graph of many, each on the next buffers. One that is
        far from `best` is timed but roughly."""
        once = self._graph_seconds(copies, 1, 2)
        if once > FAR * best + FAR_S:
            return once
        count = min(max(int(GRAPH_S / max(once, 1e-9)), 1), MOST_CALLS)
        return self._graph_seconds(copies, count, self.meter.rounds_for(count * once))

    def _graph_seconds(self, copies: Sequence[Sequence[Call]], count: int, rounds: int) -> float:
        launcher = self.meter.launcher
        chain = [call for i in range(count) for call in copies[i % len(copies)]]
        graph = launcher.graph(chain)
        try:
            return median(launcher.seconds(graph, rounds, warmup=1)) / count
        finally:
            graph.close()


def _fields(weight: StoredWeight) -> dict[str, int]:
    return {
        a.name.rsplit(".", 1)[1]: int(np.prod(a.shape, dtype=np.int64)) * itemsize(a.dtype)
        for a in weight.arrays
    }


def _numbers(g: np.random.Generator, dtype: str, size: int) -> np.ndarray:
    """Random contents for `size` bytes, or for the first of many: small normal floats, any bytes
    for codes."""
    if dtype in ("float32", "float16"):
        kind = np.dtype(dtype)
        few = min(size // kind.itemsize, BLOCK - 1)  # odd: the rows of a matrix differ all the same
        return (g.standard_normal(few, np.float32) * np.float32(0.02)).astype(kind)
    if dtype in ("bfloat16", "uint16"):
        wide = g.standard_normal(min(size // 2, BLOCK - 1), np.float32) * np.float32(0.02)
        return (wide.view(np.uint32) >> 16).astype(np.uint16)
    return g.integers(0, 120, min(size, BLOCK - 1)).astype(np.uint8)


def _widened(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.dtype(dtype))


def _differs(
    task: Task, results: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
) -> str | None:
    """Why a candidate is not the same computation as the default's, within twice the op's
    tolerance: each may be off by one. Pages may be off by one in what they can tell apart."""
    op = OPS[task.node.call.op]
    low = "bfloat16" if "bfloat16" in task.node.shape.dtypes.values() else "float32"
    for name, want in wanted.items():
        got = results[name]
        if want.dtype != np.float32:
            if (got != want).any():
                return f"{name} differs in {int((got != want).sum())} of {want.size} places"
            continue
        limit = 2 * op.tolerance[low]
        if name == "kv":
            limit = max(limit, torch.finfo(KV_DTYPES[task.node.call.attrs["kv_dtype"]]).eps)
        finite = np.isfinite(want)
        scale = max(float(np.abs(want[finite]).max(initial=0.0)), 1e-3)
        error = float(np.abs(got[finite] - want[finite]).max(initial=0.0)) / scale
        if not error <= limit:
            return f"{name} is off by {error:.3g} of its largest value"
    return None
