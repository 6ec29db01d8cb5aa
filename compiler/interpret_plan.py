"""Runs the plans of a CUDA artifact without a GPU: the stored nodes, at their stored addresses,
with Triton's interpreter, on host memory.

Comes in: an artifact for CUDA and the design it was made from (which knows the source of every
cubin). Goes out: a `Session`, so that everything that drives a device drives it too. For toy
models: a step takes seconds to minutes. The process must have set TRITON_INTERPRET=1 at its start.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from compiler.design import Design
from compiler.errors import ProgramError
from compiler.record import PACK, code_path
from kernels.cuda.interpret import execute
from kernels.launch import Binary, Constant, Descriptor, Number, Pointer, Slot, Source
from runtime.artifact import PARAM_TENSORMAP, Artifact, LaunchPlan
from runtime.device.arena import Arena
from runtime.device.base import StepInput, StepOutput, Ticket
from runtime.device.staging import (
    DEPTH,
    PlanIo,
    arena_sizes,
    by_cost,
    capacity,
    demand,
    relocate,
)


class InterpretedSession:
    """`pages` of KV; one step at a time is computed in `submit`."""

    def __init__(self, artifact: Artifact, made: Design, pages: int) -> None:
        manifest = artifact.manifest
        self.capacity = capacity(manifest, pages)
        self._sources = {code_path(b): (source, b) for source, b in made.binaries.items()}
        sizes = arena_sizes(manifest, pages)
        self._arenas = tuple(Arena(size) for size in sizes)
        # What no launch wrote must not matter: work and pages start as garbage, the counters and
        # the token state as zeros.
        self._arenas[2].bytes[manifest.counters_bytes :] = 0xA5
        self._arenas[1].bytes[manifest.state.pages_offset :] = 0xFF
        self._load_weights(artifact)
        self._counters = self._arenas[2].bytes[: manifest.counters_bytes]
        staging = [np.zeros(manifest.io_bytes, np.uint8) for _ in range(DEPTH)]
        received = [np.zeros(manifest.io_bytes, np.uint8) for _ in range(DEPTH)]
        self._staging, self._received = staging, received
        self._plans: dict[str, tuple[LaunchPlan, PlanIo, npt.NDArray[np.uint64]]] = {}
        bases = [arena.address for arena in self._arenas]
        for bucket in manifest.buckets:
            plan = artifact.plan(0, bucket.name)
            values = relocate(artifact, plan, bases, sizes, maps=True)
            self._plans[bucket.name] = plan, PlanIo(plan.header, staging, received), values
        self._steps = 0
        self._done: dict[Ticket, StepOutput] = {}

    def _load_weights(self, artifact: Artifact) -> None:
        path, start = artifact.weights_data(0)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(artifact.manifest.weights_bytes)
        self._arenas[0].bytes[: len(data)] = np.frombuffer(data, np.uint8)

    def submit(self, step: StepInput) -> Ticket:
        wanted = demand(step)
        for bucket in by_cost(plan.header.bucket for plan, _, _ in self._plans.values()):
            if wanted.fits(bucket):
                break
        else:
            raise ValueError(f"no plan for {wanted}")
        began = time.perf_counter()
        plan, io, values = self._plans[bucket.name]
        side = self._steps % DEPTH
        held = io.hold(side, step)
        first, size = held.fill(step)
        block = self._arenas[3].bytes
        block[first : first + size] = self._staging[side][first : first + size]
        for index in range(len(plan.nodes)):
            self.run_node(plan, values, index)
        self._received[side][: io.size] = block[io.start : io.start + io.size]
        ticket = self._steps
        self._done[ticket] = held.take(time.perf_counter() - began)
        self._steps += 1
        return ticket

    def collect(self, ticket: Ticket) -> StepOutput:
        return self._done.pop(ticket)

    def close(self) -> None:
        self._plans.clear()

    def run_node(self, plan: LaunchPlan, values: npt.NDArray[np.uint64], index: int) -> None:
        """One stored node: its parameters bound by the binary's ABI to the names of its source."""
        node = plan.nodes[index]
        source, binary = self._sources[plan.header.kernels[int(node["kernel"])].file]
        first = int(node["first_param"])
        arguments = self._arguments(plan, values, first, source, binary)
        x, y, z = (int(n) for n in node["grid"])
        execute(
            source.function,
            (x // binary.cluster, y, z),
            {**arguments, **dict(source.constants)},
            lambda slot: slot.offset,
        )
        if self._counters.any():
            where = f"plan {plan.header.bucket.name}, node {index} ({plan.header.labels[index]})"
            raise ProgramError(f"{where} leaves counters that are not zero")

    def _arguments(
        self,
        plan: LaunchPlan,
        values: npt.NDArray[np.uint64],
        first: int,
        source: Source,
        binary: Binary,
    ) -> Mapping[str, Slot | Constant]:
        types = dict(source.signature)
        result: dict[str, Any] = {}
        for i, parameter in enumerate(binary.parameters, first):
            value, row = int(values[i]), plan.params[i]
            if parameter.kind == "pointer":
                result[parameter.name] = Pointer(
                    arg="", offset=value, type=types[parameter.name].removeprefix("*")
                )
            elif parameter.kind == "number":
                kind = types[parameter.name]
                data = value.to_bytes(8, "little")[: parameter.size]
                result[parameter.name] = Number(type=kind, value=struct.unpack(PACK[kind], data)[0])
            elif parameter.kind == "tensormap":
                if int(row["kind"]) != PARAM_TENSORMAP:
                    raise ProgramError(f"parameter {parameter.name} is no tensor map in the plan")
                map = plan.header.tensormaps[int(row["aux"])]
                match = re.fullmatch(r"tensordesc<(\w+)\[([\d, ]+)\]>", types[parameter.name])
                assert match is not None, types[parameter.name]
                result[parameter.name] = Descriptor(
                    arg="",
                    type=match[1],
                    shape=map.shape,
                    strides=map.strides,
                    block=tuple(int(n) for n in match[2].split(",")),
                    offset=self._arenas[map.arena].address + map.offset,
                )
        return result
