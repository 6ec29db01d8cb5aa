"""A step on its way to a device and back: which plan serves it, the io block it is written into,
the slices that come out. The same for every device.

Comes in: steps and the headers of plans. Goes out: filled staging buffers and `StepOutput`s. The
addresses of a plan's parameters are made here too (`relocate`). Called by the CPU and the CUDA
session.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.artifact import (
    PARAM_ADDRESS,
    PARAM_BYTES,
    PARAM_TENSORMAP,
    Artifact,
    Bucket,
    IoField,
    LaunchPlan,
    Manifest,
    PlanHeader,
)
from runtime.device.base import I32, Capacity, StepInput, StepOutput
from runtime.errors import DamagedArtifact, IncompatibleTarget

DEPTH = 2  # steps in flight, and staging buffers of each kind
EDIT_BYTES = 16

Buffer = npt.NDArray[np.uint8]
Views = dict[str, npt.NDArray[np.generic]]

ROW_FIELDS = (
    *("row_token", "row_slot", "row_target", "row_flags", "row_top", "seed"),
    *("temperature", "top_k", "top_p", "min_p", "frequency", "presence", "repetition"),
)


def capacity(manifest: Manifest, pages: int) -> Capacity:
    state, embedding = manifest.state, manifest.model.embedding
    return Capacity(
        context=min(manifest.model.context, pages * state.page_size),
        vocab=manifest.model.vocab,
        page_size=state.page_size,
        pages=pages,
        max_seqs=manifest.max_seqs,
        max_tokens=manifest.max_tokens,
        slots=state.slots,
        edits=manifest.edits,
        embedding=embedding.dim if embedding else 0,
        whole=bool(embedding and embedding.whole),
        rope_rule=manifest.model.rope_rule,
    )


def arena_sizes(manifest: Manifest, pages: int) -> tuple[int, ...]:
    """Bytes, in the order of runtime.plan.ARENAS."""
    state = manifest.state
    return (
        manifest.weights_bytes,
        state.pages_offset + pages * state.page_bytes,
        manifest.work_bytes,
        manifest.io_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a step needs of a bucket."""

    tokens: int
    seqs: int  # sequences or logit rows, whichever are more
    pages: int
    decode: bool  # every sequence has exactly one token

    def fits(self, bucket: Bucket) -> bool:
        return (
            bucket.tokens >= self.tokens
            and bucket.seqs >= self.seqs
            and bucket.pages >= self.pages
            and (self.decode or bucket.kind != "decode")
        )


def demand(step: StepInput) -> Demand:
    tokens, seqs = len(step.tokens), len(step.seq_len)
    return Demand(
        tokens=tokens,
        seqs=max(seqs, len(step.row_token)),
        pages=columns(step.pages),
        # As many tokens as sequences: no sequence is without a token.
        decode=tokens == seqs,
    )


def columns(pages: I32 | list[I32]) -> int:
    """Of page tables, as `StepInput` holds them."""
    return pages.shape[1] if isinstance(pages, np.ndarray) else max(map(len, pages))


def by_cost(buckets: Iterable[Bucket]) -> list[Bucket]:
    """The first that fits a step is the cheapest that does."""
    return sorted(buckets, key=lambda b: (b.tokens, b.seqs, b.pages, b.kind != "decode"))


def none_fits(step: Demand, buckets: Sequence[Bucket]) -> ValueError:
    return ValueError(
        f"no plan for {step.tokens} tokens, {step.seqs} sequences, {step.pages} pages; the largest "
        f"is {buckets[-1]}"
    )


class Held:
    """A step in a staging buffer, and where its outputs will be: made by `PlanIo.hold`, filled for
    it and for later ones that keep its rows."""

    __slots__ = (
        "_edits",
        "_fields",
        "_first",
        "_kept",
        "_kv_slots",
        "_masks",
        "_output",
        "_pages",
        "_positions",
        "_rope_variant",
        "_rows",
        "_seq_len",
        "_upload",
    )

    def __init__(self, io: PlanIo, fields: Views, outputs: Views, step: StepInput) -> None:
        n, s, r = len(step.tokens), len(step.seq_len), len(step.row_token)
        self._kept = step.kept
        self._pages: I32 | list[I32] | None = None
        self._fields, self._rows, self._edits = fields, r, 0
        self._first, self._masks, self._upload = io.first, io.masks, io.upload
        self._positions = fields["positions"][:n]
        self._kv_slots = fields["kv_slots"][:n]
        self._seq_len = fields["seq_len"][:s]
        self._rope_variant = fields["rope_variant"][:n] if "rope_variant" in fields else None
        fields["live"][:4] = n, s, r, 0
        _fill_kept(fields, step, n, s, r)
        rows = s if "embedding" in outputs else r
        out: Any = {name: view[:rows] for name, view in outputs.items()}
        self._output = StepOutput(seconds=0.0, **out)

    def keeps(self, step: StepInput) -> bool:
        """Whether `fill` writes everything that this step has and the one before has not."""
        kept = self._kept
        if kept is None or kept is not step.kept:
            return False
        return self._pages is step.pages or columns(step.pages) <= self._fields["pages"].shape[1]

    def fill(self, step: StepInput) -> tuple[int, int]:
        """Where the bytes to upload begin, and how many they are."""
        self._positions[:] = step.positions
        self._kv_slots[:] = step.kv_slots
        self._seq_len[:] = step.seq_len
        if step.pages is not self._pages:
            self._pages = step.pages
            _write_pages(self._fields["pages"], step.pages)
        if self._rope_variant is not None:
            assert step.rope_variant is not None, "the capacity has a rope_rule"
            self._rope_variant[:] = step.rope_variant
        first, edits = self._first, len(step.edits)
        if step.row_mask is not None and step.masks is not None and len(step.masks):
            first = self._mask(step.row_mask, step.masks)
        if edits != self._edits:
            self._fields["live"][3] = self._edits = edits
        if edits:
            self._fields["edits"][:edits] = step.edits
        return first, self._upload + edits * EDIT_BYTES - first

    def _mask(self, row_mask: I32, masks: I32) -> int:
        """Where the bytes to upload begin. No later step keeps that rows are masked."""
        table = self._fields["masks"]
        unused = len(table) - len(masks)
        table[unused:] = masks
        self._fields["row_mask"][: self._rows] = np.where(row_mask < 0, -1, row_mask + unused)
        self._kept = None
        return self._masks + unused * table.strides[0]

    def take(self, seconds: float) -> StepOutput:
        """What the finished step left in its received buffer: views, that the next step in it
        overwrites."""
        self._output.seconds = seconds
        return self._output


class PlanIo:
    """A plan's io block in staging memory. `start`, `size`: the part that is downloaded.

    `staging[i]` and `received[i]` are the host's two sides of step i, i + DEPTH, …; a received
    buffer begins with the first output.
    """

    def __init__(
        self, header: PlanHeader, staging: Sequence[Buffer], received: Sequence[Buffer]
    ) -> None:
        inputs = [f for f in header.io if not f.output]
        outputs = [f for f in header.io if f.output]
        self.start = min(f.offset for f in outputs)
        self.size = header.io_bytes - self.start
        # `masks` come first and are filled from their end, `edits` come last: what is unused of
        # both is not uploaded. A pooled model has neither.
        self.first = next(f.offset for f in inputs if f.name == "live")
        self.masks = next((f.offset for f in inputs if f.name == "masks"), 0)
        self.upload = next((f.offset for f in inputs if f.name == "edits"), self.start)
        self._fields = tuple({f.name: _view(b, f, 0) for f in inputs} for b in staging)
        self._outputs = tuple({f.name: _view(b, f, self.start) for f in outputs} for b in received)

    def hold(self, side: int, step: StepInput) -> Held:
        """Writes what later steps may keep; `fill` writes the rest."""
        return Held(self, self._fields[side], self._outputs[side], step)


def _fill_kept(fields: Views, step: StepInput, n: int, s: int, r: int) -> None:
    """What `StepInput.kept` speaks of but the pages, and that no row is masked."""
    fields["tokens"][:n] = step.tokens
    for name in ROW_FIELDS if r else ():
        fields[name][:r] = getattr(step, name)
    if r:
        fields["row_mask"][:r] = -1
    fields["seq_start"][: s + 1] = step.seq_start


def _write_pages(table: npt.NDArray[np.generic], pages: I32 | list[I32]) -> None:
    if isinstance(pages, np.ndarray):
        table[: len(pages), : pages.shape[1]] = pages
    else:
        for row, some in zip(table, pages, strict=False):
            row[: len(some)] = some


def _view(buffer: Buffer, field: IoField, base: int) -> npt.NDArray[np.generic]:
    count = int(np.prod(field.shape))
    flat: npt.NDArray[np.generic] = np.frombuffer(
        buffer, np.dtype(field.dtype), count, field.offset - base
    )
    return flat.reshape(field.shape)


def relocate(
    artifact: Artifact,
    plan: LaunchPlan,
    bases: Sequence[int],
    sizes: Sequence[int],
    *,
    maps: bool = False,
) -> npt.NDArray[np.uint64]:
    """Parameters as kernels take them: bytes as they are, offsets made addresses. `maps`: tensor
    maps are known to the device (their entries stay 0)."""
    params, name, target = plan.params, plan.header.bucket.name, artifact.manifest.target.kind
    kinds, values = params["kind"], params["value"].astype(np.uint64)
    known = [PARAM_BYTES, PARAM_ADDRESS, *([PARAM_TENSORMAP] if maps else [])]
    foreign = ~np.isin(kinds, known)
    if foreign.any():
        raise IncompatibleTarget(
            f"artifact {artifact.path}, plan {name}: expected parameters of a {target} plan, found "
            f"kind {int(kinds[foreign][0])}; compile it again"
        )
    address = kinds == PARAM_ADDRESS
    limits = np.maximum(np.array(sizes, np.uint64), 1)[params["arena"][address]]
    outside = values[address] >= limits
    if outside.any():
        raise DamagedArtifact(
            f"artifact {artifact.path}, plan {name}: expected an address below "
            f"{int(limits[outside][0])}, found {int(values[address][outside][0])}; compile it again"
        )
    values[address] += np.array(bases, np.uint64)[params["arena"][address]]
    return values
