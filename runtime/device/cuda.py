"""A session on an NVIDIA GPU, through the driver alone. The one file that imports cuda-bindings.

Comes in: an artifact compiled for the GPU. Goes out: `CudaSession`. Opening checks the machine
before it loads anything, maps the arenas, makes graphs of the stored plans in a thread and streams
the weights meanwhile. A step is written into page-locked memory and becomes one upload, one graph
launch and one download on one stream; sampled tokens feed the next step on the device. Opened by
`open_session`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from runtime.artifact import ARENAS, Artifact, Bucket
from runtime.device.arena import kv_pages
from runtime.device.base import StepInput, StepOutput, Ticket
from runtime.device.driver import Driver, check_gpu, find_gpu
from runtime.device.gpu_code import Code
from runtime.device.gpu_graph import Graph, plan_graph
from runtime.device.gpu_memory import (
    WISHED,
    GpuArena,
    Pinned,
    make_context,
    make_event,
    make_stream,
)
from runtime.device.gpu_plans import GpuPlan, PlanSet
from runtime.device.gpu_weights import load_weights
from runtime.device.staging import DEPTH, Held, PlanIo, arena_sizes, capacity, demand
from runtime.errors import HeadstartError, IncompatibleTarget, NoSpace

# Left free for what the driver allocates itself: graphs, code, the local memory of kernels.
RESERVE = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Flying:
    """A step on the device."""

    ticket: Ticket
    held: Held
    side: int


def open_driver() -> Driver:
    """The driver's bindings; the driver itself starts with the first call."""
    try:
        from cuda.bindings import driver as api
    except ImportError as error:
        raise IncompatibleTarget(
            f"cuda-bindings is needed to use a GPU ({error}); pip install 'headstart[cuda]'"
        ) from error
    return Driver(api)


class CudaSession:
    def __init__(
        self,
        artifact: Artifact,
        *,
        gpu: int = 0,
        kv_tokens: int | None = None,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._artifact = artifact
        self._stack = ExitStack()
        self._closed = False
        self._thread = threading.get_ident()  # the one the context is current in
        self._steps = 0
        self._held: list[tuple[GpuPlan, Held] | None] = [None] * DEPTH  # per side: its last step
        self._flying: list[Flying] = []
        try:
            self._open(gpu, kv_tokens, mark)
        except BaseException:
            with suppress(HeadstartError):  # the first failure is the one to tell
                self._stack.close()
            raise

    # --- a step ---------------------------------------------------------------------------------

    def submit(self, step: StepInput) -> Ticket:
        if len(self._flying) >= DEPTH:
            raise ValueError(f"{len(self._flying)} steps are in flight, a session holds {DEPTH}")
        self._enter()
        self._plans.check()
        plan = self._plans.fitting(demand(step))
        side = self._steps % DEPTH
        last = self._held[side]
        # A larger plan serves only until the step's own stands.
        if last is None or last[0] is not plan or not last[1].keeps(step):
            last = self._held[side] = plan, plan.io.hold(side, step)
        first, size = last[1].fill(step)
        driver, stream, io = self._driver, self._stream, self._bases[ARENAS.index("io")]
        driver("cuEventRecord", self._begun[side], stream)
        source = self._staging[side].address + first
        driver("cuMemcpyHtoDAsync", io + first, source, size, stream)
        plan.graph.launch(stream)
        received = self._received[side].address
        driver("cuMemcpyDtoHAsync", received, io + plan.io.start, plan.io.size, stream)
        driver("cuEventRecord", self._ended[side], stream)
        self._steps += 1
        self._flying.append(Flying(ticket=self._steps, held=last[1], side=side))
        return self._steps

    def collect(self, ticket: Ticket) -> StepOutput:
        if not self._flying or self._flying[0].ticket != ticket:
            raise ValueError(f"ticket {ticket} is not the oldest step in flight")
        self._enter()
        step = self._flying[0]
        ended = self._ended[step.side]
        self._driver("cuEventSynchronize", ended)
        milliseconds = self._driver("cuEventElapsedTime", self._begun[step.side], ended)
        self._flying.pop(0)
        return step.held.take(milliseconds / 1e3)

    def complete(self) -> None:
        """Waits until every plan stands, so that no step takes a larger one for lack of its own."""
        self._plans.wait(all=True)

    def nodes(self, bucket: str, only: Sequence[int]) -> Graph:
        """Some nodes of a plan as a graph of their own, for measuring them with the inputs of the
        last step. The caller closes it."""
        artifact = self._artifact
        plan = artifact.plan(0, bucket)
        return plan_graph(
            self._driver, artifact, plan, self._code, self._bases, self._sizes, only=only
        )

    @property
    def plan_seconds(self) -> dict[str, float]:
        """What each plan took to make, by name of its bucket."""
        return dict(self._plans.seconds)

    @property
    def weights(self) -> tuple[int, int]:
        """Address and bytes of the weights arena."""
        return self._bases[0], self._artifact.manifest.weights_bytes

    def close(self) -> None:
        """Also with steps in flight: their results are lost. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._flying.clear()
        self._enter()
        self._stack.close()

    def _enter(self) -> None:
        """The driver's context belongs to a thread; sessions are opened in one and run in
        another."""
        if self._thread != threading.get_ident():
            self._driver("cuCtxSetCurrent", self._context)
            self._thread = threading.get_ident()

    # --- opening --------------------------------------------------------------------------------

    def _open(self, index: int, kv_tokens: int | None, mark: Callable[[str], None]) -> None:
        artifact, manifest, stack = self._artifact, self._artifact.manifest, self._stack
        driver = self._driver = open_driver()
        gpu = find_gpu(driver, index)
        check_gpu(artifact, gpu)
        self._context = make_context(driver, gpu, stack)
        free, _ = driver("cuMemGetInfo")
        try:
            pages = kv_pages(manifest, kv_tokens, max(free - RESERVE, 0), share=1.0)
        except NoSpace as error:
            raise IncompatibleTarget(f"GPU {index} ({gpu.name}): {error}") from error
        self.capacity = capacity(manifest, pages)
        mark("device")
        sizes = arena_sizes(manifest, pages)
        arenas = tuple(
            GpuArena(driver, gpu, size, stack, wish=WISHED[name])
            for name, size in zip(ARENAS, sizes, strict=True)
        )
        self._bases = tuple(arena.address for arena in arenas)
        stream = self._stream = make_stream(driver, stack)
        self._begun = tuple(make_event(driver, stack, timing=True) for _ in range(DEPTH))
        self._ended = tuple(make_event(driver, stack, timing=True) for _ in range(DEPTH))
        self._staging = tuple(Pinned(driver, manifest.io_bytes, stack) for _ in range(DEPTH))
        self._received = tuple(Pinned(driver, manifest.io_bytes, stack) for _ in range(DEPTH))
        self._clear(stream)
        mark("arenas")
        self._sizes = sizes
        code = self._code = Code(driver, artifact.read)
        stack.callback(code.close)
        background = make_stream(driver, stack)

        def make(bucket: Bucket) -> GpuPlan:
            plan = artifact.plan(0, bucket.name)
            graph = plan_graph(driver, artifact, plan, code, self._bases, sizes)
            try:
                graph.upload(background)
            except BaseException:
                graph.close()
                raise
            staging = [side.bytes for side in self._staging]
            received = [side.bytes for side in self._received]
            io = PlanIo(plan.header, staging, received)
            return GpuPlan(bucket=bucket, graph=graph, io=io)

        self._plans = PlanSet(
            manifest.buckets, make, lambda: driver("cuCtxSetCurrent", self._context)
        )
        stack.callback(self._plans.close)
        for busy in (background, stream):  # graphs are destroyed when nothing uses them
            stack.callback(driver, "cuStreamSynchronize", busy)
        load_weights(driver, self._context, artifact, self._bases[0])
        mark("weights")
        self._plans.wait()
        driver("cuStreamSynchronize", stream)
        mark("plans")

    def _clear(self, stream: Any) -> None:
        """Zero: the kernels' counters, token state, the io block. Pages and other temporaries are
        written before they are read."""
        manifest, (_, state, work, io) = self._artifact.manifest, self._bases
        regions = (
            (state, manifest.state.pages_offset),
            (work, manifest.counters_bytes),
            (io, manifest.io_bytes),
        )
        for address, size in regions:
            if size:
                self._driver("cuMemsetD8Async", address, 0, size, stream)
