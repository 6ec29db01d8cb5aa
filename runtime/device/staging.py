"""A step on its way to a device and back: which plan serves it, the io block it is written into,
the slices that come out. The same for every device.

Comes in: steps and the headers of plans. Goes out: filled staging buffers and `StepOutput`s. The
addresses of a plan's parameters are made here too (`relocate`). Called by the CPU and the CUDA
session.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
from runtime.device.base import Capacity, StepInput, StepOutput
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
    tokens, seqs, table = len(step.tokens), len(step.seq_len), step.pages
    return Demand(
        tokens=tokens,
        seqs=max(seqs, len(step.row_token)),
        pages=table.shape[1] if isinstance(table, np.ndarray) else max(map(len, table)),
        # As many tokens as sequences: no sequence is without a token.
        decode=tokens == seqs,
    )


def by_cost(buckets: Iterable[Bucket]) -> list[Bucket]:
    """The first that fits a step is the cheapest that does."""
    return sorted(buckets, key=lambda b: (b.tokens, b.seqs, b.pages, b.kind != "decode"))


def none_fits(step: Demand, buckets: Sequence[Bucket]) -> ValueError:
    return ValueError(
        f"no plan for {step.tokens} tokens, {step.seqs} sequences, {step.pages} pages; the largest "
        f"is {buckets[-1]}"
    )


@dataclass(frozen=True, slots=True)
class Held:
    """Of a step in a staging buffer: its plan, and the objects by which a later one tells that it
    has the same rows and pages."""

    plan: PlanIo
    kept: object
    pages: object

    def is_in(self, was: Held | None) -> bool:
        """Whether the step written before left everything that this one keeps."""
        return (
            was is not None
            and self.kept is not None
            and was.plan is self.plan
            and was.kept is self.kept
            and was.pages is self.pages
        )


class PlanIo:
    """A plan's io block in staging memory. `start`, `size`: the part that is downloaded.

    `staging[i]` and `received[i]` are the host's two sides of step i, i + DEPTH, …; a received
    buffer begins with the first output. `held[i]`, shared by the plans of a session: what the
    staging buffer holds of a step that was written last, if a later one may keep it.
    """

    def __init__(
        self,
        header: PlanHeader,
        staging: Sequence[Buffer],
        received: Sequence[Buffer],
        held: list[Held | None],
    ) -> None:
        self._held = held
        inputs = [f for f in header.io if not f.output]
        outputs = [f for f in header.io if f.output]
        self.start = min(f.offset for f in outputs)
        self.size = header.io_bytes - self.start
        # `masks` come first and are filled from their end, `edits` come last: what is unused of
        # both is not uploaded. A pooled model has neither.
        self._first = next(f.offset for f in inputs if f.name == "live")
        self._masks = next((f.offset for f in inputs if f.name == "masks"), 0)
        self._upload = next((f.offset for f in inputs if f.name == "edits"), self.start)
        self._fields = tuple({f.name: _view(b, f, 0) for f in inputs} for b in staging)
        self._outputs = tuple({f.name: _view(b, f, self.start) for f in outputs} for b in received)

    def fill(self, side: int, step: StepInput) -> tuple[int, int]:
        """Writes the step into a staging buffer; where the bytes to upload begin, and how many
        they are."""
        fields, held = self._fields[side], Held(self, step.kept, step.pages)
        n, s, r, e = len(step.tokens), len(step.seq_len), len(step.row_token), len(step.edits)
        fields["live"][:4] = n, s, r, e
        fields["positions"][:n] = step.positions
        fields["kv_slots"][:n] = step.kv_slots
        fields["seq_len"][:s] = step.seq_len
        if "rope_variant" in fields:
            assert step.rope_variant is not None, "the capacity has a rope_rule"
            fields["rope_variant"][:n] = step.rope_variant
        if not held.is_in(self._held[side]):
            _fill_kept(fields, step, n, s, r)
        self._held[side] = held
        first, row_mask = self._first, step.row_mask
        if row_mask is not None and step.masks is not None and len(step.masks):
            table = fields["masks"]
            unused = len(table) - len(step.masks)
            table[unused:] = step.masks
            fields["row_mask"][:r] = np.where(row_mask < 0, -1, row_mask + unused)
            first = self._masks + unused * table.strides[0]
            self._held[side] = None
        if e:
            fields["edits"][:e] = step.edits
        return first, self._upload + e * EDIT_BYTES - first

    def take(self, side: int, rows: int, seconds: float) -> StepOutput:
        """Copies of what a finished step left in its received buffer."""
        out = {name: view[:rows].copy() for name, view in self._outputs[side].items()}
        return StepOutput(seconds=seconds, **out)  # type: ignore[arg-type]


def _fill_kept(fields: Views, step: StepInput, n: int, s: int, r: int) -> None:
    """What `StepInput.kept` speaks of, and that no row is masked."""
    fields["tokens"][:n] = step.tokens
    for name in ROW_FIELDS if r else ():
        fields[name][:r] = getattr(step, name)
    if r:
        fields["row_mask"][:r] = -1
    fields["seq_start"][: s + 1] = step.seq_start
    table = fields["pages"]
    if isinstance(step.pages, np.ndarray):
        table[:s, : step.pages.shape[1]] = step.pages
    else:
        for row, pages in zip(table, step.pages, strict=False):
            row[: len(pages)] = pages


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
