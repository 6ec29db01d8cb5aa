"""A session on the CPU: the artifact's plans, relocated and run by its native library.

Comes in: an artifact. Goes out: `CpuSession`. Opening streams the weights into their arena, checks
them while they are warm in the cache, and turns every stored plan into a native one. A step is
copied into one of two staging buffers and queued; the native driver thread uploads, runs and
downloads without the GIL. Opened by `open_session`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.artifact import PARAM_ADDRESS, PARAM_BYTES, Artifact, Bucket, LaunchPlan
from runtime.device.arena import Arena, kv_pages
from runtime.device.base import Capacity, StepInput, StepOutput, Ticket
from runtime.device.machine import available_memory, cores, cpus
from runtime.device.native import choose_library, open_library, symbol
from runtime.errors import DamagedArtifact, IncompatibleTarget, NoSpace, UsageError

READ_GROUP = 16 << 20  # weights are checked in groups that are still in the cache
DEPTH = 2  # steps in flight

TOKEN_FIELDS = ("tokens", "positions", "kv_slots")
ROW_FIELDS = (
    *("row_token", "row_slot", "row_target", "row_flags", "row_top", "seed"),
    *("temperature", "top_k", "top_p", "min_p", "frequency", "presence", "repetition"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan ready to run. `fields`: for each staging buffer, a view of it per io field; `outputs`
    likewise.
    """

    bucket: Bucket
    handle: int
    upload: int  # bytes before the edits
    download: tuple[int, int]
    fields: tuple[dict[str, npt.NDArray[np.generic]], ...]
    outputs: tuple[dict[str, npt.NDArray[np.generic]], ...]
    values: npt.NDArray[np.uint64]  # the relocated parameters the native plan points to


class CpuSession:
    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        kv_tokens: int | None = None,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> None:
        manifest = artifact.manifest
        self._artifact = artifact
        self._library = choose_library(artifact)
        self.threads = choose_threads(threads)
        pages = kv_pages(manifest, kv_tokens, available_memory())
        state = manifest.state
        self.capacity = Capacity(
            context=min(manifest.model.context, pages * state.page_size),
            vocab=manifest.model.vocab,
            page_size=state.page_size,
            pages=pages,
            max_seqs=manifest.max_seqs,
            max_tokens=manifest.max_tokens,
            slots=state.slots,
            edits=manifest.edits,
            embedding=manifest.model.embedding.dim if manifest.model.embedding else 0,
            whole=bool(manifest.model.embedding and manifest.model.embedding.whole),
            rope_rule=manifest.model.rope_rule,
        )
        self._native = open_library(artifact, self._library)
        mark("library")
        self._team: int | None = self._native.hs_open(self.threads)
        if not self._team:
            raise NoSpace(f"cannot start {self.threads} kernel threads; lower threads")
        # In the order of runtime.plan.ARENAS.
        sizes = (
            manifest.weights_bytes,
            state.pages_offset + pages * state.page_bytes,
            manifest.work_bytes,
            manifest.io_bytes,
        )
        self._arenas = tuple(Arena(size) for size in sizes)
        self._staging = tuple(np.zeros(manifest.io_bytes, np.uint8) for _ in range(DEPTH))
        self._received = tuple(np.zeros(manifest.io_bytes, np.uint8) for _ in range(DEPTH))
        self._load_weights()
        mark("weights")
        # The smallest plan that fits is the first that fits.
        buckets = sorted(manifest.buckets, key=lambda b: (b.tokens, b.seqs, b.pages))
        self._plans = tuple(self._instantiate(artifact.plan(0, b.name)) for b in buckets)
        mark("plans")
        self._steps = 0
        self._flying: list[tuple[Ticket, Plan, int, int]] = []

    @property
    def level(self) -> str:
        """The instruction set level of the library in use."""
        return self._library.level

    # --- a step ---------------------------------------------------------------------------------

    def submit(self, step: StepInput) -> Ticket:
        if len(self._flying) >= DEPTH:
            raise ValueError(f"{len(self._flying)} steps are in flight, a session holds {DEPTH}")
        n, s, r, e = len(step.tokens), len(step.seq_len), len(step.row_token), len(step.edits)
        plan = self._fitting(n, max(s, r), step)
        side = self._steps % DEPTH
        self._steps += 1
        fields = plan.fields[side]
        fields["live"][:4] = n, s, r, e
        for name in TOKEN_FIELDS:
            fields[name][:n] = getattr(step, name)
        if "rope_variant" in fields:
            assert step.rope_variant is not None, "the capacity has a rope_rule"
            fields["rope_variant"][:n] = step.rope_variant
        for name in ROW_FIELDS if r else ():
            fields[name][:r] = getattr(step, name)
        fields["seq_start"][: s + 1] = step.seq_start
        fields["seq_len"][:s] = step.seq_len
        table = fields["pages"]
        if isinstance(step.pages, np.ndarray):
            table[:s, : step.pages.shape[1]] = step.pages
        else:
            for row, pages in zip(table, step.pages, strict=False):
                row[: len(pages)] = pages
        if e:
            fields["edits"][:e] = step.edits
        start, size = plan.download
        ticket = self._native.hs_submit(
            self._team,
            plan.handle,
            self._arenas[3].address,
            self._staging[side].ctypes.data,
            plan.upload + e * 16,
            self._received[side].ctypes.data,
            start,
            size,
        )
        self._flying.append((ticket, plan, side, s if self.capacity.embedding else r))
        return ticket

    def collect(self, ticket: Ticket) -> StepOutput:
        if not self._flying or self._flying[0][0] != ticket:
            raise ValueError(f"ticket {ticket} is not the oldest step in flight")
        seconds = self._native.hs_wait(self._team, ticket)
        _, plan, side, rows = self._flying.pop(0)
        out = {name: view[:rows].copy() for name, view in plan.outputs[side].items()}
        return StepOutput(seconds=seconds, **out)  # type: ignore[arg-type]

    def close(self) -> None:
        if self._team is None:
            return
        while self._flying:
            self.collect(self._flying[0][0])
        for plan in self._plans:
            self._native.hs_plan_free(plan.handle)
        self._native.hs_close(self._team)
        self._team = None

    def _fitting(self, tokens: int, seqs: int, step: StepInput) -> Plan:
        table = step.pages
        pages = table.shape[1] if isinstance(table, np.ndarray) else max(map(len, table))
        for plan in self._plans:
            b = plan.bucket
            if b.tokens >= tokens and b.seqs >= seqs and b.pages >= pages:
                return plan
        raise ValueError(
            f"no plan for {tokens} tokens, {seqs} sequences, {pages} pages; the largest is "
            f"{self._plans[-1].bucket}"
        )

    # --- opening --------------------------------------------------------------------------------

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
        artifact.check_finite(0, arena.bytes)

    def _instantiate(self, plan: LaunchPlan) -> Plan:
        header = plan.header
        values = self._relocate(plan)
        entries = np.array([self._entry(k.entry) for k in header.kernels], np.uint64)
        functions = np.ascontiguousarray(entries[plan.nodes["kernel"]])
        arguments = plan.nodes["first_param"].astype(np.uint64) * 8 + values.ctypes.data
        handle = self._native.hs_plan(
            self._team, len(plan.nodes), functions.ctypes.data, arguments.ctypes.data
        )
        if not handle:
            raise NoSpace(f"cannot make plan {header.bucket.name} of {len(plan.nodes)} nodes")
        inputs = [f for f in header.io if not f.output]
        outputs = [f for f in header.io if f.output]
        start = min(f.offset for f in outputs)

        def view(
            buffer: npt.NDArray[np.uint8], field: object, base: int
        ) -> npt.NDArray[np.generic]:
            dtype, count = np.dtype(field.dtype), int(np.prod(field.shape))  # type: ignore[attr-defined]
            return np.frombuffer(buffer, dtype, count, field.offset - base).reshape(field.shape)  # type: ignore[attr-defined]

        return Plan(
            bucket=header.bucket,
            handle=handle,
            upload=next((f.offset for f in inputs if f.name == "edits"), start),
            download=(start, header.io_bytes - start),
            fields=tuple({f.name: view(b, f, 0) for f in inputs} for b in self._staging),
            outputs=tuple({f.name: view(b, f, start) for f in outputs} for b in self._received),
            values=values,
        )

    def _relocate(self, plan: LaunchPlan) -> npt.NDArray[np.uint64]:
        """Parameters as the kernels take them: bytes as they are, offsets made addresses."""
        params, name = plan.params, plan.header.bucket.name
        kinds, values = params["kind"], params["value"].astype(np.uint64)
        foreign = (kinds != PARAM_BYTES) & (kinds != PARAM_ADDRESS)
        if foreign.any():
            raise IncompatibleTarget(
                f"artifact {self._artifact.path}, plan {name}: expected parameters of the CPU, "
                "found kind "
                f"{int(kinds[foreign][0])}; compile it for cpu"
            )
        address = kinds == PARAM_ADDRESS
        sizes = np.array([a.size for a in self._arenas], np.uint64)[params["arena"][address]]
        outside = values[address] >= np.maximum(sizes, 1)
        if outside.any():
            raise DamagedArtifact(
                f"artifact {self._artifact.path}, plan {name}: expected an address below "
                f"{int(sizes[outside][0])}, found "
                f"{int(values[address][outside][0])}; compile it again"
            )
        bases = np.array([a.address for a in self._arenas], np.uint64)
        values[address] += bases[params["arena"][address]]
        return values

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
