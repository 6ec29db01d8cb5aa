"""`python -m compiler.tune model=<name> target=<gpu> [option=value …]`: measures which kernel and
configuration is best for every call of a model on this machine's GPU, and writes the choices to
`kernels/tuned/<gpu>.json`.

Each candidate runs through the runtime's own launcher as a graph of many calls on rotating buffers,
so that no weight is found in the cache; one that does not compute what the first candidate computes
is left out. Then, bucket by bucket, the close contenders of a call are tried in the whole step and
the fastest step decides. Stops at `seconds`; what was not measured keeps the heuristic's choice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from compiler.bind import Built, bind, bind_plan
from compiler.design import Draft, draft, nodes_of
from compiler.importer import import_model
from compiler.lower import Node, accepting, bucket_sizes, call_shape, label
from compiler.memory import value_bytes
from compiler.progress import Progress
from compiler.record import record
from compiler.store import StoredWeight, weight_formats
from compiler.tune_inputs import pages_of, step_inputs
from compiler.tuned import FOLDER, Records, call_key, load_records, save_records
from conf.errors import ConfigError
from conf.load import run
from conf.resolve import resolve
from conf.schema import TuneConfig
from kernels.cuda.build import build_each, versions
from kernels.cuda.kernel import CudaKernel
from kernels.kernel import CallShape
from kernels.launch import COUNTERS, COUNTERS_BYTES, WORKSPACE, Binary, Descriptor, Pointer, Source
from kernels.op import OPS
from runtime.artifact import ARENAS, Bucket
from runtime.device.driver import version
from runtime.device.launcher import Call, Launcher
from runtime.weights_file import itemsize

NO_USE = ("out", "name", "accuracy.max_delta", "accuracy.measure")  # options of a compile alone
ALIGN = 256
PATTERN = 0x3C  # every float format reads this byte, repeated, as a small positive number
ROTATE = 3  # times the second-level cache that a graph's buffers take
MOST_CALLS = 64
CLOSE = 1.05  # contenders: at most so much slower than the best
STEADY = 1.01  # a whole step must gain so much to change a choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    kernel: CudaKernel
    config: Any

    @property
    def name(self) -> str:
        values = ", ".join(f"{k}={v}" for k, v in asdict(self.config).items())
        return f"{self.kernel.name}({values})"

    def entry(self, seconds: float) -> dict[str, Any]:
        us = round(seconds * 1e6, 3)
        return {"kernel": self.kernel.name, "config": asdict(self.config), "us": us}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call to measure, as it first appears, with every candidate (the default first)."""

    key: str
    bucket: Bucket
    node: Node
    candidates: tuple[Candidate, ...]


def main(config: TuneConfig, sources: Mapping[str, str]) -> None:
    if config.target.kind != "cuda":
        raise ConfigError(
            f"target={config.target.name}: only GPUs are tuned; name the GPU of this machine, "
            "target=h200 or target=h100"
        )
    for key in NO_USE:
        if sources.get(key) == "override":
            raise ConfigError(f"{key}: does nothing here, nothing is published; leave it out")
    folder = FOLDER if config.records is None else Path(config.records)
    progress = Progress()
    model = import_model(config)
    resolved, _ = resolve(
        config,
        sources,
        checkpoint_dtype=model.dtype,
        context=model.spec.context,
        whole=model.spec.whole,
    )
    base = draft(model.spec, resolved)
    with Launcher(config.gpu) as launcher:
        tuner = Tuner(launcher, base, config, progress)
        records = tuner.run(load_records(config.target.name, folder))
    path = save_records(records, folder)
    progress.show(f"{len(records.entries)} records in {path}")


class Tuner:
    def __init__(
        self, launcher: Launcher, base: Draft, config: TuneConfig, progress: Progress
    ) -> None:
        self.launcher, self.base, self.config, self.progress = launcher, base, config, progress
        self.weights = {weight.name: weight for weight in base.weights}
        self.deadline = time.monotonic() + config.seconds
        self.page = base.shape.page_size
        context = min(config.context, base.shape.context)
        self.context = context
        wanted = max(pages_of(bucket, context, self.page) for bucket in base.buckets)
        room = int(launcher.free_memory() * 0.4) // base.state.page_bytes
        self.pool = max(min(wanted, room), 1)
        self.state_bytes = base.state.pages_offset + self.pool * base.state.page_bytes
        self.state = launcher.allocate(self.state_bytes)
        launcher.fill(self.state, base.state.pages_offset, 0)
        pages = self.pool * base.state.page_bytes
        launcher.fill(self.state + base.state.pages_offset, pages, PATTERN)
        self.memory = _Memory(launcher, int(launcher.free_memory() * 0.8), config.memory_gib)
        self.left_out: list[str] = []

    def run(self, before: Records) -> Records:
        """What was measured now, over what was known before."""
        tasks = tuple(self.tasks())
        with self.progress.stage("kernels"):
            built = self.build(tasks)
        entries = dict(before.entries)
        ranked: dict[str, list[tuple[float, Candidate]]] = {}
        with self.progress.stage("calls", len(tasks)) as advance:
            for task in tasks:
                if time.monotonic() < self.deadline:
                    ranked[task.key] = self.rank(task, built)
                    entries[task.key] = ranked[task.key][0][1].entry(ranked[task.key][0][0])
                advance(1)
        gpu = self.launcher.gpu
        tools = {**versions(), "gpu": gpu.name, "driver": version(gpu.driver)}
        records = Records(gpu=self.config.target.name, versions=tools, entries=entries)
        with self.progress.stage("steps", len(self.base.buckets)) as advance:
            for bucket in self.base.buckets:
                if time.monotonic() < self.deadline:
                    records = self.settle(bucket, records, ranked, built)
                advance(1)
        missed = len(tasks) - len(ranked)
        if missed:
            self.progress.show(
                f"time    {missed} of {len(tasks)} calls were not measured within "
                f"seconds={self.config.seconds:g}; run it again with more"
            )
        for reason in dict.fromkeys(self.left_out):
            self.progress.show(f"without {reason}")
        return records

    # --- what to measure ------------------------------------------------------------------------

    def tasks(self) -> Iterator[Task]:
        """Every distinct call that has a choice, decode buckets first."""
        formats, seen = weight_formats(self.base.weights), set()
        for bucket in self.base.buckets:
            nodes = nodes_of(self.base.program, self.base.weights, bucket, "cuda")
            for node in nodes:
                shape = call_shape(self.base.program, node.call, bucket, formats)
                key = call_key(shape)
                if key in seen or (self.config.ops and shape.op not in self.config.ops):
                    continue
                seen.add(key)
                candidates = self.candidates(node, shape)
                if len(candidates) > 1:
                    yield Task(key=key, bucket=bucket, node=node, candidates=candidates)

    def candidates(self, node: Node, shape: CallShape) -> tuple[Candidate, ...]:
        first = Candidate(kernel=node.kernel, config=node.config)  # type: ignore[arg-type]
        kernels = accepting(shape, "cuda", label(node.call))
        rest = (Candidate(kernel=k, config=c) for k in kernels for c in k.candidates(shape))
        return tuple(dict.fromkeys((first, *rest)))

    def build(self, tasks: Sequence[Task]) -> Built:
        """Cubins of every candidate. One that does not build is left out, with the reason; a
        default must build."""
        wanted = [
            launch.source
            for task in tasks
            for c in task.candidates
            for launch in c.kernel.launches(task.node.shape, c.config)
            if launch.source is not None
        ]
        arch = str(self.config.target.arch)
        built, failed = build_each(wanted, Path(self.config.cache), arch)
        self.left_out += [str(error).splitlines()[0] for error in failed.values()]
        return built

    # --- one call -------------------------------------------------------------------------------

    def rank(self, task: Task, built: Built) -> list[tuple[float, Candidate]]:
        """Seconds of one call by candidate, best first; the default alone where nothing else is
        right."""
        shape, found = task.node.shape, []
        buffers = _Buffers(self, task)
        wanted: dict[str, np.ndarray] = {}
        for number, candidate in enumerate(task.candidates):
            launches = candidate.kernel.launches(shape, candidate.config)
            if not all(_usable(x.source, built, number == 0) for x in launches):
                continue
            if number and time.monotonic() > self.deadline:
                break
            size = candidate.kernel.workspace(shape, candidate.config)
            calls = [
                [bind(self.launcher, x, built, buffers.address(copy, size)) for x in launches]
                for copy in range(buffers.copies)
            ]
            results = buffers.results(calls[0])
            if not number:
                wanted = results
            elif reason := _differs(task, results, wanted):
                self.left_out.append(f"{candidate.name} for {label(task.node.call)}: {reason}")
                continue
            found.append((self.seconds(calls), candidate))
        return sorted(found, key=lambda pair: pair[0])

    def seconds(self, copies: Sequence[Sequence[Call]]) -> float:
        """Median device time of one call: a graph of many, each on the next buffers."""
        count = min(max(len(copies), 16), MOST_CALLS)
        chain = [call for i in range(count) for call in copies[i % len(copies)]]
        graph = self.launcher.graph(chain)
        try:
            return median(self.launcher.seconds(graph, self.config.rounds)) / count
        finally:
            graph.close()

    # --- whole steps ----------------------------------------------------------------------------

    def settle(
        self,
        bucket: Bucket,
        records: Records,
        ranked: Mapping[str, list[tuple[float, Candidate]]],
        built: Built,
    ) -> Records:
        """Tries the close contenders of each call in the whole step of the bucket."""
        binaries = {source: binary for source, (binary, _) in built.items()}
        nodes = nodes_of(self.base.program, self.base.weights, bucket, "cuda", records)
        missing = [
            x.source for n in nodes for x in n.launches if x.source and x.source not in built
        ]
        more, _ = build_each(missing, Path(self.config.cache), str(self.config.target.arch))
        built = {**built, **more}
        binaries |= {source: binary for source, (binary, _) in more.items()}
        best = self.step_seconds(bucket, records, built, binaries)
        if best is None:
            return records
        for key in dict.fromkeys(call_key(node.shape) for node in nodes):
            options = ranked.get(key, [])
            for seconds, candidate in options[1 : 1 + self.config.contenders]:
                if seconds > options[0][0] * CLOSE or time.monotonic() > self.deadline:
                    break
                entry = candidate.entry(seconds)
                trial = replace(records, entries={**records.entries, key: entry})
                took = self.step_seconds(bucket, trial, built, binaries)
                if took is not None and took * STEADY < best:
                    best, records = took, trial
        self.progress.show(f"step {bucket.name}: {best * 1e6:.1f} us")
        return records

    def step_seconds(
        self, bucket: Bucket, records: Records, built: Built, binaries: Mapping[Source, Binary]
    ) -> float | None:
        """Median time of the bucket's whole step with these choices; None where it does not fit
        into memory."""
        base = self.base
        nodes = nodes_of(base.program, base.weights, bucket, "cuda", records)
        plan, work = record(base.program, nodes, bucket, base.addresses, binaries)
        tensors = base.tensors[-1]
        places = self.memory.places(tensors.offset + tensors.size, work, plan.header.io_bytes)
        if places is None:
            return None
        weights, scratch, io = places
        inputs = step_inputs(base.program, bucket, self.context, self.page, self.pool)
        block = np.zeros(plan.header.io_bytes, np.uint8)
        for f in plan.header.io:
            if not f.output:
                raw = np.ascontiguousarray(inputs[f.name]).view(np.uint8).reshape(-1)
                block[f.offset : f.offset + len(raw)] = raw
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
            return median(self.launcher.seconds(graph, self.config.rounds))
        finally:
            graph.close()


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


class _Buffers:
    """Rotating copies of everything one call touches. The first copy has real numbers, for the
    comparison of results; all share the state."""

    def __init__(self, tuner: Tuner, task: Task) -> None:
        self.tuner, self.task = tuner, task
        program, sizes = tuner.base.program, bucket_sizes(task.bucket)
        self.inputs = step_inputs(
            program, task.bucket, tuner.context, tuner.page, tuner.pool, seed=1
        )
        self.names = {**task.node.call.ins, **task.node.call.outs}
        self.sizes: dict[str, int] = {}  # "<argument>" or "<argument>.<field>"
        for arg, name in self.names.items():
            value = program.values[name]
            if value.kind == "weight":
                for field, size in _fields(tuner.weights[name]).items():
                    self.sizes[f"{arg}.{field}"] = size
            elif value.kind != "state":
                self.sizes[arg] = value_bytes(program, name, sizes)
        shape = task.node.shape
        scratch = max(c.kernel.workspace(shape, c.config) for c in task.candidates)
        self.sizes |= {COUNTERS: COUNTERS_BYTES, WORKSPACE: max(scratch, 1)}
        total = sum(-(-size // ALIGN) * ALIGN for size in self.sizes.values())
        rotate = -(-ROTATE * tuner.launcher.gpu.l2 // total)
        self.copies = max(min(rotate, tuner.memory.size // total, MOST_CALLS), 1)
        self.places: list[dict[str, int]] = []
        found = tuner.memory.places(*list(self.sizes.values()) * self.copies)
        if found is None:
            raise ConfigError(
                f"memory_gib={tuner.config.memory_gib:g}: {label(task.node.call)} takes "
                f"{total / (1 << 30):.2f} GiB; give more"
            )
        for copy in range(self.copies):
            first = copy * len(self.sizes)
            self.places.append(dict(zip(self.sizes, found[first:], strict=False)))
            self.fill(copy)

    def fill(self, copy: int) -> None:
        launcher, places = self.tuner.launcher, self.places[copy]
        g = np.random.default_rng(0)
        for key, size in self.sizes.items():
            arg, _, field = key.partition(".")
            if key == COUNTERS:
                launcher.fill(places[key], size, 0)
            elif arg in self.names and self.names[arg] in self.inputs:
                launcher.write(places[key], self.inputs[self.names[arg]])
            elif copy or size > 1 << 28:
                launcher.fill(places[key], size, PATTERN)
            else:
                launcher.write(places[key], _numbers(g, self.dtype(arg, field), size))

    def dtype(self, arg: str, field: str) -> str:
        name = self.names.get(arg)
        value = self.tuner.base.program.values.get(name) if name else None
        if value is None:
            return "uint8"
        if value.kind != "weight":
            return value.dtype
        arrays = self.tuner.weights[value.name].arrays
        return next(a.dtype for a in arrays if a.name.endswith(f".{field}"))

    def address(self, copy: int, workspace: int) -> Any:
        places, base = self.places[copy], self.tuner.base

        def address(slot: Pointer | Descriptor) -> int:
            if slot.arg == WORKSPACE and not workspace:
                return 0
            if slot.arg in (WORKSPACE, COUNTERS):
                return places[slot.arg] + slot.offset
            name = self.names[slot.arg]
            value = base.program.values[name]
            if value.kind == "state":
                return self.tuner.state + base.state_offsets[name] + slot.offset
            key = f"{slot.arg}.{slot.field or 'data'}" if value.kind == "weight" else slot.arg
            return places[key] + slot.offset

        return address

    def results(self, calls: Sequence[Call]) -> dict[str, np.ndarray]:
        """What the first copy's outputs hold after one run."""
        launcher, program = self.tuner.launcher, self.tuner.base.program
        outs = {
            arg: name
            for arg, name in self.task.node.call.outs.items()
            if program.values[name].kind != "state"
        }
        for arg in outs:
            launcher.fill(self.places[0][arg], self.sizes[arg], 0)
        graph = launcher.graph(calls)
        try:
            launcher.run(graph)
        finally:
            graph.close()
        found = {}
        for arg, name in outs.items():
            raw = launcher.read(self.places[0][arg], self.sizes[arg])
            found[arg] = _widened(raw, program.values[name].dtype)
        return found


def _usable(source: Source | None, built: Built, default: bool) -> bool:
    """Built, and not spilling registers: such a candidate never wins, and there are many."""
    return source is None or (source in built and (default or not built[source][0].stack))


def _fields(weight: StoredWeight) -> dict[str, int]:
    return {
        a.name.rsplit(".", 1)[1]: int(np.prod(a.shape, dtype=np.int64)) * itemsize(a.dtype)
        for a in weight.arrays
    }


def _numbers(g: np.random.Generator, dtype: str, size: int) -> np.ndarray:
    """Random contents: small normal floats, any bytes for codes."""
    if dtype in ("float32", "float16"):
        kind = np.dtype(dtype)
        return (g.standard_normal(size // kind.itemsize) * 0.02).astype(kind)
    if dtype in ("bfloat16", "uint16"):
        wide = (g.standard_normal(size // 2) * 0.02).astype(np.float32)
        return (wide.view(np.uint32) >> 16).astype(np.uint16)
    return g.integers(0, 120, size).astype(np.uint8)


def _widened(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.dtype(dtype))


def _differs(
    task: Task, results: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
) -> str | None:
    """Why a candidate is not the same computation as the default's, within twice the op's
    tolerance: each may be off by one."""
    op = OPS[task.node.call.op]
    low = "bfloat16" if "bfloat16" in task.node.shape.dtypes.values() else "float32"
    for name, want in wanted.items():
        got = results[name]
        if want.dtype != np.float32:
            if (got != want).any():
                return f"{name} differs in {int((got != want).sum())} of {want.size} places"
            continue
        finite = np.isfinite(want)
        scale = max(float(np.abs(want[finite]).max(initial=0.0)), 1e-3)
        error = float(np.abs(got[finite] - want[finite]).max(initial=0.0)) / scale
        if not error <= 2 * op.tolerance[low]:
            return f"{name} is off by {error:.3g} of its largest value"
    return None


if __name__ == "__main__":
    sys.exit(run(TuneConfig, "tune", main))
