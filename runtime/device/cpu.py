"""A session on the CPU: the artifact's plans, relocated and run by its native library.

Comes in: an artifact. Goes out: `CpuSession`. Opening streams the weights into their arena, checks
them while they are warm in the cache, and turns every stored plan into a native one. A step is
copied into one of two staging buffers and queued; the native threads upload, run and download
without the GIL. Opened by `open_session`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from runtime.artifact import Artifact, Bucket, LaunchPlan
from runtime.device.arena import Arena, kv_pages
from runtime.device.base import StepInput, StepOutput, Ticket
from runtime.device.machine import available_memory, cores, cpus
from runtime.device.native import choose_library, open_library, symbol
from runtime.device.staging import (
    DEPTH,
    Demand,
    Held,
    PlanIo,
    arena_sizes,
    by_cost,
    capacity,
    demand,
    none_fits,
    relocate,
)
from runtime.errors import DamagedArtifact, NoSpace, UsageError

READ_GROUP = 16 << 20  # weights are checked in groups that are still in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan ready to run."""

    bucket: Bucket
    handle: int
    nodes: int
    io: PlanIo
    values: npt.NDArray[np.uint64]  # the relocated parameters the native plan points to


@dataclass(slots=True, kw_only=True)
class PlanTimes:
    """Seconds of the steps of one bucket: `total` of `steps` whole ones, `nodes[i]` of them in node
    i of the plan."""

    nodes: npt.NDArray[np.float64]
    steps: int = 0
    total: float = 0.0


class CpuSession:
    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        kv_tokens: int | None = None,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._artifact = artifact
        self._library = choose_library(artifact)
        self.threads = choose_threads(threads)
        self._steps = 0
        self._held: list[tuple[Plan, Held] | None] = [None] * DEPTH  # per side: its last step
        self._flying: list[tuple[Ticket, Plan, Held]] = []
        self._times: dict[str, PlanTimes] | None = None
        with ExitStack() as stack:
            self._open(kv_tokens, mark, stack)
            self._stack = stack.pop_all()

    @property
    def level(self) -> str:
        """The instruction set level of the library in use."""
        return self._library.level

    # --- a step ---------------------------------------------------------------------------------

    def submit(self, step: StepInput) -> Ticket:
        if len(self._flying) >= DEPTH:
            raise ValueError(f"{len(self._flying)} steps are in flight, a session holds {DEPTH}")
        side = self._steps % DEPTH
        last = self._held[side]
        if last is None or not last[1].keeps(step):
            plan = self._fitting(demand(step))
            last = self._held[side] = plan, plan.io.hold(side, step)
        plan, held = last
        self._steps += 1
        first, upload = held.fill(step)
        ticket = self._native.hs_submit(
            self._team,
            plan.handle,
            self._arenas[3].address + first,
            self._addresses[side][0] + first,
            upload,
            self._addresses[side][1],
            plan.io.start - first,
            plan.io.size,
        )
        self._flying.append((ticket, plan, held))
        return ticket

    def collect(self, ticket: Ticket) -> StepOutput:
        if not self._flying or self._flying[0][0] != ticket:
            raise ValueError(f"ticket {ticket} is not the oldest step in flight")
        seconds = self._native.hs_wait(self._team, ticket)
        _, plan, held = self._flying.pop(0)
        if self._times is not None:
            self._count(self._times, plan, seconds)
        return held.take(seconds)

    def call(self, function: int, argument: int) -> float:
        """Runs a native function of kernels/cpu/abi.h on the kernel threads, after the steps that
        are submitted; the seconds it ran. For measurements that must not wake other threads."""
        return float(self._native.hs_run(self._team, function, argument))

    @contextmanager
    def profiling(self) -> Iterator[Callable[[], dict[str, PlanTimes]]]:
        """Times every node of the steps within, at a clock read per node. Gives a function: the
        times so far by name of bucket, of all steps submitted so far. No step may be in flight at
        the beginning.
        """
        if self._flying:
            raise ValueError(f"{len(self._flying)} steps are in flight, a profile begins with none")
        times = {p.bucket.name: PlanTimes(nodes=np.zeros(p.nodes)) for p in self._plans}
        self._profile(times)
        try:
            yield lambda: self._finished(times)
        finally:
            self._finished(times)
            self._profile(None)

    def _profile(self, times: dict[str, PlanTimes] | None) -> None:
        self._times = times
        for plan in self._plans:
            into = times[plan.bucket.name].nodes.ctypes.data if times else None
            self._native.hs_plan_profile(plan.handle, into)

    def _finished(self, times: dict[str, PlanTimes]) -> dict[str, PlanTimes]:
        """A copy that includes the steps in flight, once they have ended."""
        ran = [(plan, self._native.hs_wait(self._team, t)) for t, plan, *_ in self._flying]
        now = {name: replace(of, nodes=of.nodes.copy()) for name, of in times.items()}
        for plan, seconds in ran:
            self._count(now, plan, seconds)
        return now

    @staticmethod
    def _count(times: dict[str, PlanTimes], plan: Plan, seconds: float) -> None:
        times[plan.bucket.name].steps += 1
        times[plan.bucket.name].total += seconds

    def close(self) -> None:
        """Waits for the steps in flight. May be called twice."""
        while self._flying:
            self.collect(self._flying[0][0])
        self._stack.close()

    def _fitting(self, step: Demand) -> Plan:
        for plan in self._plans:
            if step.fits(plan.bucket):
                return plan
        raise none_fits(step, [plan.bucket for plan in self._plans])

    # --- opening --------------------------------------------------------------------------------

    def _open(self, kv_tokens: int | None, mark: Callable[[str], None], stack: ExitStack) -> None:
        """`stack` gets what must be given back: the threads, then the plans they run."""
        artifact, manifest = self._artifact, self._artifact.manifest
        pages = kv_pages(manifest, kv_tokens, available_memory())
        self.capacity = capacity(manifest, pages)
        self._native = open_library(artifact, self._library)
        mark("library")
        self._team: int = self._native.hs_open(self.threads)
        if not self._team:
            raise NoSpace(f"cannot start {self.threads} kernel threads; lower threads")
        stack.callback(self._native.hs_close, self._team)
        self._arenas = tuple(Arena(size) for size in arena_sizes(manifest, pages))
        self._staging = tuple(np.zeros(manifest.io_bytes, np.uint8) for _ in range(DEPTH))
        self._received = tuple(np.zeros(manifest.io_bytes, np.uint8) for _ in range(DEPTH))
        sides = zip(self._staging, self._received, strict=True)
        self._addresses = tuple((out.ctypes.data, into.ctypes.data) for out, into in sides)
        self._load_weights()
        mark("weights")
        buckets = by_cost(manifest.buckets)
        self._plans = tuple(self._instantiate(artifact.plan(0, b.name), stack) for b in buckets)
        mark("plans")

    def _load_weights(self) -> None:
        """Read, then checked, group by group; all threads do both."""
        artifact, arena = self._artifact, self._arenas[0]
        path, data = artifact.weights_data(0)
        tensors = artifact.manifest.tensors[0]
        offsets = np.array([t.offset for t in tensors], np.int64)
        sizes = np.array([t.size for t in tensors], np.int64)
        found = np.zeros(len(tensors), np.uint32)
        first = 0
        while first < len(tensors):
            end = offsets[first] + READ_GROUP
            last = max(int(np.searchsorted(offsets + sizes, end, "right")), first + 1)
            start = int(offsets[first])
            size = int(offsets[last - 1] + sizes[last - 1]) - start
            error = self._native.hs_read(
                self._team, os.fsencode(path), data + start, arena.address + start, size
            )
            if error:
                raise DamagedArtifact(
                    f"artifact {artifact.path}, file {path.name}: reading tensor "
                    f"{tensors[first].name} ({size} bytes at "
                    f"{data + start}) failed: {os.strerror(error)}; copy the artifact again"
                )
            self._native.hs_crc32c(
                self._team,
                arena.address,
                offsets[first:].ctypes.data,
                sizes[first:].ctypes.data,
                found[first:].ctypes.data,
                last - first,
            )
            first = last
        artifact.check_crcs(0, found.tolist())
        for tensor in tensors:
            artifact.check_finite(
                0, tensor, arena.bytes[tensor.offset : tensor.offset + tensor.size]
            )

    def _instantiate(self, plan: LaunchPlan, stack: ExitStack) -> Plan:
        header = plan.header
        arenas = self._arenas
        values = relocate(
            self._artifact, plan, [a.address for a in arenas], [a.size for a in arenas]
        )
        entries = np.array([self._entry(k.entry) for k in header.kernels], np.uint64)
        functions = np.ascontiguousarray(entries[plan.nodes["kernel"]])
        arguments = plan.nodes["first_param"].astype(np.uint64) * 8 + values.ctypes.data
        handle = self._native.hs_plan(
            self._team, len(plan.nodes), functions.ctypes.data, arguments.ctypes.data
        )
        if not handle:
            raise NoSpace(f"cannot make plan {header.bucket.name} of {len(plan.nodes)} nodes")
        stack.callback(self._native.hs_plan_free, handle)
        return Plan(
            bucket=header.bucket,
            handle=handle,
            nodes=len(plan.nodes),
            io=PlanIo(header, self._staging, self._received),
            values=values,
        )

    def _entry(self, name: str) -> int:
        function = symbol(self._native, name, self._artifact, self._library)
        return ctypes.cast(function, ctypes.c_void_p).value or 0


def choose_threads(wanted: int | None) -> int:
    """Physical cores unless told; never more threads than CPUs this process may use."""
    if wanted is None:
        return cores()
    if not 1 <= wanted <= cpus():
        raise UsageError(
            f"threads: expected 1 to {cpus()} (the CPUs of this process), got {wanted}"
        )
    return wanted
