"""One rank of one artifact on one device, as the engine loop sees it.

A step is submitted as plain arrays and collected later; a session may hold two steps in flight (the
loop submits step n before it collects n-1), in which tokens sampled by step n-1 feed step n on the
device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import IncompatibleTarget, UsageError

if TYPE_CHECKING:
    from runtime.artifact import Artifact, LengthRule

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

TOP = 20  # columns of the top-logprob outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Sizes the scheduler must respect. Tokens unless named otherwise."""

    context: int  # longest sequence, prompt + output
    vocab: int
    page_size: int
    pages: int
    max_seqs: int  # sequences (and logit rows) in a step; also token-state slots are `slots`
    max_tokens: int  # tokens in a step
    slots: int  # token-state slots: sequences that may be alive on the device
    edits: int  # state edits in a step
    embedding: int = 0  # numbers of the vector a sequence gives; 0: it gives tokens
    whole: bool = False  # a sequence must be computed in one step
    rope_rule: LengthRule | None = None  # None: rope does not depend on lengths


@dataclass(slots=True, kw_only=True)
class StepInput:
    """The live part of every io input, unpadded. n tokens, s sequences, r logit rows, e edits.

    tokens[n]      token id, or -1-slot: the token last sampled for that slot (still on the device)
    positions[n]   position of the token in its sequence
    kv_slots[n]    where its key and value go: page * page_size + offset
    seq_start[s+1] first token of each sequence in the flat batch
    seq_len[s]     keys visible to the sequence's last token in this step (its length after it)
    pages          page tables, one row per sequence: a 2-D array or a list of arrays; entries past
                   seq_len are ignored
    row_token[r]   flat index of the token whose logits are wanted
    row_slot[r]    token-state slot (last token, counts, bias)
    row_target[r]  -1: sample; otherwise only report this token's logprob (prompt scoring)
    row_flags[r]   1: penalties or bias apply; 2: logprob wanted
    row_top[r]     number of top logprobs wanted, 0..20
    row_mask[r]    row of `masks` with the tokens that may be sampled, -1: all; None: all -1
    masks[m, ceil(vocab / 32)]  int32; bit b of word w allows token 32 w + b
    temperature, top_p, min_p, frequency, presence, repetition [r] float32; temperature 0 = greedy
    top_k[r]       int32, 0 = all
    seed[r]        int64; the draw is a function of (seed, position of the row's token)
    rope_variant[n]  row of rope frequencies (Capacity.rope_rule); None where there is one row
    edits[e, 4]    (slot, token, kind, value) applied before sampling, in order:
                   kind 0 clear the slot's counts and bias; 1 mark token as seen in the prompt;
                   2 add value to its output count; 3 set its bias to the float32 whose bits are
                   value
    kept           steps with the same object here (None: with no other) have equal tokens,
                   seq_start, row_* and sampling fields, and equal pages where `pages` is the same
                   object too: a session need not write them again
    """

    tokens: I32
    positions: I32
    kv_slots: I32
    seq_start: I32
    seq_len: I32
    pages: I32 | list[I32]
    row_token: I32
    row_slot: I32
    row_target: I32
    row_flags: I32
    row_top: I32
    temperature: F32
    top_k: I32
    top_p: F32
    min_p: F32
    frequency: F32
    presence: F32
    repetition: F32
    seed: I64
    edits: I32
    row_mask: I32 | None = None
    masks: I32 | None = None
    rope_variant: I32 | None = None
    kept: object = None


@dataclass(slots=True, kw_only=True)
class StepOutput:
    """Per logit row: token[r] (sampled, or row_target echoed), logprob[r] of it under the model's
    own distribution (before temperature, penalties and bias; NaN unless wanted),
    top_ids/top_logprobs[r, 20], status[r] (0 ok, 1 non-finite logits, 2 the mask leaves no token
    whose value is finite; such rows have no token).

    The arrays may be views of the session's memory: they are valid until the next step is
    submitted, or the session closed.

    An embedding model has no logit rows. Per sequence: embedding[s, dim], of what its tokens up to
    this step's last one give, and status[s] (1: not finite, the vector is 0).
    """

    status: I32
    seconds: float  # device time of the step
    token: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    logprob: F32 = field(default_factory=lambda: np.zeros(0, np.float32))
    top_ids: I32 = field(default_factory=lambda: np.zeros((0, TOP), np.int32))
    top_logprobs: F32 = field(default_factory=lambda: np.zeros((0, TOP), np.float32))
    embedding: F32 | None = None


Ticket = int


class Session(Protocol):
    capacity: Capacity

    def submit(self, step: StepInput) -> Ticket: ...

    def collect(self, ticket: Ticket) -> StepOutput: ...

    def close(self) -> None: ...


def open_session(
    artifact: Artifact | None,
    *,
    device: str = "auto",
    threads: int | None = None,
    gpu: int | None = None,
    kv_tokens: int | None = None,
    trust: str | None = None,
    null_step_s: float = 0.0,
    mark: Callable[[str], None] = lambda phase: None,
) -> Session:
    """The session for an artifact on this machine. `device`: auto (what the artifact was compiled
    for) or null (no kernels; then `artifact` may be None). `threads` concerns the CPU alone, `gpu`
    (its index, null: 0) a GPU alone. `mark` hears the phases of the start.
    """
    if device == "null":
        for option, value in (("threads", threads), ("gpu", gpu)):
            if value is not None:
                raise _no_effect(option, value, "device=null runs no kernels")
        from runtime.device.null import NullSession, null_capacity

        return NullSession(null_capacity(artifact, kv_tokens), step_s=null_step_s)
    if artifact is None:
        raise UsageError("artifact: expected a path, got none")
    kind = artifact.manifest.target.kind
    if null_step_s:
        raise _no_effect("null_step_s", null_step_s, "only device=null takes made-up time")
    check_trust(artifact, trust)
    if artifact.manifest.ranks != 1:
        raise IncompatibleTarget(
            f"artifact {artifact.path} was compiled for {artifact.manifest.ranks} ranks, this "
            "runtime drives 1; compile it with "
            "parallel.tp=1"
        )
    if kind == "cuda":
        if threads is not None:
            raise _no_effect("threads", threads, f"artifact {artifact.path} is for {kind}")
        from runtime.device.cuda import CudaSession

        return CudaSession(artifact, gpu=gpu or 0, kv_tokens=kv_tokens, mark=mark)
    if gpu is not None:
        raise _no_effect("gpu", gpu, f"artifact {artifact.path} is for {kind}")
    from runtime.device.cpu import CpuSession

    return CpuSession(artifact, threads=threads, kv_tokens=kv_tokens, mark=mark)


def _no_effect(option: str, value: float, why: str) -> UsageError:
    return UsageError(f"{option}={value} has no effect: {why}; leave it out")


def check_trust(artifact: Artifact, trust: str | None) -> None:
    """An artifact brings binaries, and binaries are programs: one that another user wrote runs only
    when its digest is named.
    """
    if trust is not None and trust != artifact.digest:
        raise UsageError(
            f"trust_artifact: {trust} is not this artifact's digest {artifact.digest}; check where "
            "it comes from"
        )
    owner = artifact.path.stat().st_uid
    if trust is None and owner not in (0, os.getuid()):
        raise UsageError(
            f"artifact {artifact.path} belongs to user {owner}, not to {os.getuid()}, and holds "
            "programs; give "
            f"trust_artifact={artifact.digest} if you trust it"
        )
