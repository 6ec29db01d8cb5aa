"""The scheduler's nouns: a `Sequence` (one request and how far it got), `Slots` (the device-side
rows of the running ones), and `Step` (what the scheduler decided). Plain data; made by
scheduler.py, read by batch.py and commit.py.

Lengths of a running sequence, in tokens:

    length   tokens whose keys and values are submitted to the device
    known    tokens the host has seen: the prompt, and outputs that were collected
    limit    prompt + max_new_tokens, or where rope changes for the whole sequence and it must be
             computed again: known ends there, length one before
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from runtime.device.base import F32, I32, I64, Capacity, StepInput
from runtime.request import Finish, Request, TopLogprobs

Index = npt.NDArray[np.intp]

WAITING, PREFILL, DECODE, DRAIN, DONE = range(
    5
)  # DRAIN: everything submitted, results on their way

PENALTIES, LOGPROB = 1, 2  # row_flags
ONE = np.ones((), np.int32)  # numpy would make a Python number such an array at every addition


class Sequence:
    """`life` of its slot is part of every step record: results for an earlier life are dropped."""

    __slots__ = (
        "arrival",
        "arrived",
        "ban",
        "cached",
        "constrained",
        "deadline",
        "keys",
        "order",
        "passed",
        "prefill",
        "prompt_logprobs",
        "prompt_top",
        "queue_s",
        "request",
        "retractions",
        "rope_row",
        "score_next",
        "seed",
        "slot",
        "special",
        "started",
        "state",
        "stops",
        "tokens",
        "verdict",
        "wait_deadline",
    )

    def __init__(
        self,
        request: Request,
        *,
        arrival: int,
        arrived: float,
        seed: int,
        stops: frozenset[int],
        wait_deadline: float,
        deadline: float,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.arrival = arrival
        self.arrived = arrived  # the engine's clock, in seconds
        self.seed = seed
        self.stops = stops
        self.wait_deadline = wait_deadline
        self.deadline = deadline
        self.tokens: I32 = np.array(request.tokens, np.int32)  # all known tokens, while not running
        self.keys: list[bytes] = []  # prefix keys of full pages of `tokens`
        self.rope_row = 0  # row of rope frequencies its prompt is computed with
        self.state = WAITING
        self.slot = -1
        self.order = -1  # of admission; the youngest is preempted first
        self.passed = 0  # younger requests admitted past this one
        self.prefill = 0  # tokens to compute before decoding goes on
        self.cached = 0  # prompt tokens found in the cache at first admission
        self.queue_s: float | None = None  # until first admission; None again once told
        self.started = False  # the client has heard of cached tokens and prompt logprobs
        self.retractions = 0
        # Banned until min_new_tokens are out.
        self.ban = tuple(sorted(stops)) if sampling.min_new_tokens > 0 else ()
        self.constrained = sampling.grammar is not None
        self.verdict: Finish | None = None  # its grammar ended it
        self.special = bool(request.logprobs or sampling.stop_token_ids or self.constrained)
        self.score_next = max(request.prompt_logprobs_from, 1) if self.scores else 0
        self.prompt_logprobs: list[float | None] = []
        self.prompt_top: list[TopLogprobs | None] = []
        if request.prompt_logprobs_from == 0:
            self.prompt_logprobs.append(None)
            self.prompt_top.append(None)

    def tell_queue(self) -> float | None:
        """Seconds it waited for its first admission, the first time this is asked."""
        waited, self.queue_s = self.queue_s, None
        return waited

    @property
    def scores(self) -> bool:
        return self.request.prompt_logprobs_from >= 0

    @property
    def prompt_size(self) -> int:
        return len(self.request.tokens)

    @property
    def limit(self) -> int:
        return len(self.request.tokens) + self.request.sampling.max_new_tokens

    @property
    def edits(self) -> bool:
        """Penalties, bias or bans: the token state of its slot matters."""
        s = self.request.sampling
        return bool(
            s.frequency_penalty
            or s.presence_penalty
            or s.repetition_penalty != 1.0
            or s.logit_bias
            or self.ban
        )


class Slots:
    """One row per token-state slot, as arrays. `length`, `known` and `history` of the sequences of
    the current `Rows` lack what those got since they were made: `settle` brings them up to date.
    """

    def __init__(self, capacity: Capacity) -> None:
        n = capacity.slots
        self.page_size = capacity.page_size
        self.rope_rule = capacity.rope_rule
        self.length: I32 = np.zeros(n, np.int32)
        self.known: I32 = np.zeros(n, np.int32)
        self.limit: I32 = np.zeros(n, np.int32)
        self.room: I32 = np.zeros(n, np.int32)  # tokens its pages hold
        self.life: I32 = np.zeros(n, np.int32)
        self.flags: I32 = np.zeros(n, np.int32)
        self.rope_row: I32 = np.zeros(n, np.int32)
        self.top: I32 = np.zeros(n, np.int32)
        self.top_k: I32 = np.zeros(n, np.int32)
        self.temperature: F32 = np.zeros(n, np.float32)
        self.top_p: F32 = np.zeros(n, np.float32)
        self.min_p: F32 = np.zeros(n, np.float32)
        self.frequency: F32 = np.zeros(n, np.float32)
        self.presence: F32 = np.zeros(n, np.float32)
        self.repetition: F32 = np.zeros(n, np.float32)
        self.seed: I64 = np.zeros(n, np.int64)
        columns = -(-capacity.context // capacity.page_size)
        self.table: I32 = np.zeros((n, columns), np.int32)  # page tables
        # Zero pages of memory until a row is used that far.
        self.history: I32 = np.zeros((n, capacity.context), np.int32)
        self.sequences: list[Sequence | None] = [None] * n

    def enter(self, slot: int, seq: Sequence) -> None:
        s = seq.request.sampling
        known = len(seq.tokens)
        self.sequences[slot] = seq
        self.history[slot, :known] = seq.tokens
        self.known[slot] = known
        self.limit[slot] = seq.limit
        self.rope_row[slot] = seq.rope_row
        if self.rope_rule is not None and (last := self.rope_rule.last(known)) is not None:
            self.limit[slot] = min(seq.limit, last + 1)
        self.flags[slot] = PENALTIES * seq.edits + LOGPROB * seq.request.logprobs
        self.top[slot] = seq.request.top_logprobs if seq.request.logprobs else 0
        self.top_k[slot] = s.top_k
        # Clipped to where float32 still tells them apart: below 1e-6 is greedy, above 1e6 uniform.
        self.temperature[slot] = 0.0 if s.temperature < 1e-6 else min(s.temperature, 1e6)
        self.top_p[slot] = max(s.top_p, 1e-6)
        self.min_p[slot] = s.min_p
        self.frequency[slot] = s.frequency_penalty
        self.presence[slot] = s.presence_penalty
        self.repetition[slot] = max(s.repetition_penalty, 1e-4)
        self.seed[slot] = seq.seed

    def settle(self, rows: Rows) -> None:
        self.length[rows.slots] = rows.seq_len
        if rows.heard:
            self.hear(rows.slots, np.array(rows.heard, np.int32))
            rows.heard.clear()

    def hear(self, slots: Index, tokens: I32) -> None:
        """Outputs [k, n] of n sequences, k of each."""
        known = self.known.take(slots)
        self.history[slots, known + np.arange(len(tokens))[:, None]] = tokens
        self.known[slots] = known + len(tokens)

    def leave(self, slot: int) -> None:
        self.sequences[slot] = None
        self.room[slot] = 0
        self.life[slot] += 1

    def rope_variants(self, slots: Index, positions: I32) -> I32 | None:
        """The row of rope frequencies of a token of each slot at each position; the first axes of
        both are the same."""
        rule = self.rope_rule
        if rule is None:
            return None
        rows = self.rope_row[slots]
        if rule.of == "token":
            rows = np.maximum(rows, positions + 1 - rule.bounds[0])
        return np.broadcast_to(rows, positions.shape)

    def held(self, slot: int) -> list[int]:
        return self.table[slot, : self.room[slot] // self.page_size].tolist()

    def seen(self, slot: int) -> I32:
        return self.history[slot, : self.known[slot]].copy()


class Rows:
    """The decoding sequences, fixed: made anew when one joins or leaves, shared by every step in
    between. They move in lockstep, one token each per step.

    `positions`, `seq_len` and `grown` (rows and the pages they got) are those of the step that was
    scheduled last, `heard` the outputs of each step that was collected; Slots.settle takes lengths
    and outputs over. `kv_slots`, `pages` and `given` are batch.py's.
    """

    def __init__(self, seqs: list[Sequence], slots: Slots) -> None:
        n = len(seqs)
        self.seqs = seqs
        self.slots: Index = np.array([s.slot for s in seqs], np.intp)
        self.life = slots.life[self.slots]
        self.ids = [s.request.id for s in seqs]
        self.special = [i for i, s in enumerate(seqs) if s.special]
        self.constrained = [i for i in self.special if seqs[i].constrained]
        self.tokens: I32 = (-1 - self.slots).astype(np.int32)
        self.starts: I32 = np.arange(n + 1, dtype=np.int32)
        self.heard: list[list[int]] = []
        self._moving: I32 = np.zeros((3, n), np.int32)
        self.positions, self.kv_slots, self.seq_len = self._moving
        self.seq_len[:] = slots.length[self.slots]
        self.positions[:] = self.seq_len - 1
        # Steps until the first of them has everything it may get.
        self.left = int((slots.limit[self.slots] - 1 - self.seq_len).min(initial=1 << 30))
        # The rows that need another page after so many steps, and again after each page.
        self._full: list[list[int]] = [[] for _ in range(slots.page_size)]
        for row, room in enumerate((slots.room[self.slots] - self.seq_len).tolist()):
            self._full[room].append(row)
        self._steps = 0
        self.grown: list[tuple[int, int]] = []
        self.table: I32 | None = None
        self.pages: I32 = np.zeros((n, 0), np.int32)
        self.given: StepInput | None = None

    def __len__(self) -> int:
        return len(self.seqs)

    @property
    def full(self) -> list[int]:
        """The rows whose next token needs another page."""
        return self._full[self._steps % len(self._full)]

    def advance(self) -> None:
        np.add(self._moving, ONE, out=self._moving)
        self._steps += 1
        self.left -= 1


@dataclass(slots=True, kw_only=True)
class Chunk:
    """Tokens [start, end) of one prompt. Rows: `score` targets (prompt positions score_at ..
    score_at + score), then one sampling row if `samples`. `final`: the prompt is complete with it.
    """

    seq: Sequence
    slot: int
    life: int
    start: int
    end: int
    score_at: int = 0
    score: int = 0
    samples: bool = False
    final: bool = False


@dataclass(slots=True, kw_only=True)
class Step:
    """Decode rows first, then chunks."""

    rows: Rows
    chunks: list[Chunk] = field(default_factory=list)
    edits: list[I32] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.rows) + sum(c.end - c.start for c in self.chunks)
