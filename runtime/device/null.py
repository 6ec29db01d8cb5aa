"""The null device: no kernels, deterministic tokens, and every promise of `StepInput` checked. The
scheduler's test oracle.

Comes in: steps. Goes out: `next_token` of everything a sequence has computed so far. The KV pool
holds, per token, the running hash of its sequence, so a wrong page, position or prefix changes the
answer; `strict` also reads back every visible key, and overwrites outputs when the next step comes.
Opened by `open_session` for `device=null` (load tests of everything above a device) and directly by
tests.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from runtime.device.base import I32, TOP, Capacity, StepInput, StepOutput, Ticket
from runtime.device.contract import check_sharing, check_step, need, pages_at

if TYPE_CHECKING:
    from runtime.artifact import Artifact

U64 = npt.NDArray[np.uint64]
CLEAR, MARK, COUNT, BIAS = range(4)


def mix(values: npt.NDArray[np.generic]) -> U64:
    """splitmix64."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def digests(tokens: npt.NDArray[np.generic], positions: npt.NDArray[np.generic]) -> U64:
    """What each token adds to its sequence's hash; sums wrap."""
    with np.errstate(over="ignore"):
        return mix(mix(tokens) + positions.astype(np.uint64))


class TokenState:
    """Counts and bias of one slot, as the edits and the samples made them."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.marks: set[int] = set()
        self.bias: dict[int, float] = {}

    def hash(self, frequency: float, repetition: float) -> int:
        """Changes with every count that the penalties in force would notice."""
        counted = (hash((t, n)) for t, n in self.counts.items() if n) if frequency else ()
        marked = (hash((t, -1)) for t in self.marks) if repetition != 1.0 else ()
        return (sum(counted) + sum(marked)) & (2**63 - 1)


def allowed(mask: I32, vocab: int) -> list[int]:
    """Tokens whose bits are set."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab]
    return np.flatnonzero(bits).tolist()


def choose(value: int, vocab: int, bias: dict[int, float], among: list[int] | None = None) -> int:
    """A token by hash; forbidden ones are stepped over, a strong wish is granted. `among` a mask's
    tokens: -1 where all of them are forbidden."""
    if among is not None:
        among = [token for token in among if bias.get(token, 0.0) > -100]
        among = [token for token in among if bias.get(token, 0.0) >= 100] or among
        return among[value % len(among)] if among else -1
    if bias:
        best = max(bias.values())
        if best >= 100:
            return min(t for t, b in bias.items() if b == best)
    token = value % vocab
    while bias.get(token, 0.0) <= -100:
        token = (token + 1) % vocab
    return token


class NullSession:
    """`poison`: a token whose presence in the input makes the logits of its sequence's rows not
    finite.
    """

    def __init__(
        self,
        capacity: Capacity,
        *,
        step_s: float = 0.0,
        strict: bool = False,
        poison: int | None = None,
    ) -> None:
        self.capacity = capacity
        self.steps = 0
        self._step_s = step_s
        self._strict = strict
        self._poison = poison
        size = capacity.pages * capacity.page_size
        self._hash = np.zeros(size, np.uint64)  # of the sequence up to the token in this KV slot
        self._position = np.full(size, -1, np.int32)
        self._rope = np.zeros(size, np.int32)  # row of frequencies that this key was computed with
        self._last = np.zeros(capacity.slots, np.int32)
        self._state = [TokenState() for _ in range(capacity.slots)]
        self._bad = np.zeros(size, np.bool_)
        self._done: deque[tuple[Ticket, float, StepOutput]] = deque()
        self._given: StepOutput | None = None  # collected last
        self._busy_until = 0.0

    def submit(self, step: StepInput) -> Ticket:
        """Computes at once; `collect` waits until the fake clock has got there."""
        if len(self._done) >= 2:
            raise ValueError(f"{len(self._done)} steps are in flight, a session holds two")
        check_step(step, self.capacity)
        if self._strict:
            check_sharing(step, self.capacity.page_size)
            self._spoil()
        self.steps += 1
        out = self._run(step)
        start = max(time.perf_counter(), self._busy_until) if self._step_s else 0.0
        self._busy_until = start + self._step_s
        self._done.append((self.steps, self._busy_until, out))
        return self.steps

    def collect(self, ticket: Ticket) -> StepOutput:
        if not self._done or self._done[0][0] != ticket:
            raise ValueError(f"ticket {ticket} is not the oldest step in flight")
        _, ready, out = self._done.popleft()
        if self._step_s and (left := ready - time.perf_counter()) > 0:
            time.sleep(left)
        self._given = out
        return out

    def close(self) -> None:
        self._done.clear()

    def _spoil(self) -> None:
        """Outputs are valid until the next step: who still reads the last ones reads nonsense."""
        if (out := self._given) is None:
            return
        for array in (out.status, out.token, out.logprob, out.top_ids, out.top_logprobs):
            array.fill(-77)
        if out.embedding is not None:
            out.embedding.fill(-77.0)

    # --- a step ---------------------------------------------------------------------------------

    def _run(self, step: StepInput) -> StepOutput:
        starts, size = step.seq_start.astype(np.int64), self.capacity.page_size
        fed = step.tokens < 0
        tokens = np.where(fed, self._last.take(np.where(fed, -1 - step.tokens, 0)), step.tokens)
        added = digests(tokens, step.positions)
        first = starts[:-1]
        before = step.positions[first] - 1  # the key each sequence goes on from
        column = np.maximum(before // size, 0)
        pages = pages_at(step, np.arange(len(first)), column)
        parents = np.where(before >= 0, pages * size + before % size, 0)
        hashes = np.where(before >= 0, self._hash[parents], np.uint64(0))
        bad = np.where(before >= 0, self._bad[parents], False)
        if self._strict:
            own = self._position[parents] == before
            need((own | (before < 0)).all(), "a sequence goes on from a key that is not its own")
        lengths = np.diff(starts)
        with np.errstate(over="ignore"):
            sums = np.cumsum(added, dtype=np.uint64)
            offset = sums[first] - added[first]
            chained = sums + np.repeat(hashes - offset, lengths)
        poisoned = np.repeat(bad, lengths)
        if self._poison is not None:
            for s in range(len(first)):
                hit = np.cumsum(tokens[starts[s] : starts[s + 1]] == self._poison) > 0
                poisoned[starts[s] : starts[s + 1]] |= hit
        self._hash[step.kv_slots] = chained
        self._position[step.kv_slots] = step.positions
        if step.rope_variant is not None:
            self._rope[step.kv_slots] = step.rope_variant
        self._bad[step.kv_slots] = poisoned
        if self._strict:
            self._check_keys(step, chained)
        if self.capacity.embedding:
            return self._pool(step, chained, poisoned)
        self._edit(step.edits)
        return self._sample(step, chained, poisoned)

    def _pool(self, step: StepInput, chained: U64, poisoned: npt.NDArray[np.bool_]) -> StepOutput:
        """A unit vector made of the hash of everything a sequence has computed."""
        last = step.seq_start[1:] - 1
        columns = np.arange(self.capacity.embedding, dtype=np.uint64)
        with np.errstate(over="ignore"):
            values = mix(chained[last][:, None] + columns)
        vectors = (values % np.uint64(2001)).astype(np.float64) - 1000
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        status = poisoned[last].astype(np.int32)
        vectors[status != 0] = 0
        return StepOutput(status=status, seconds=self._step_s, embedding=vectors.astype(np.float32))

    def _sample(self, step: StepInput, chained: U64, poisoned: npt.NDArray[np.bool_]) -> StepOutput:
        rows, vocab = len(step.row_token), self.capacity.vocab
        state = chained[step.row_token]
        seeds = np.where(step.temperature > 0, step.seed, 0)
        with np.errstate(over="ignore"):
            values = mix(state + mix(seeds))
        status = poisoned[step.row_token].astype(np.int32)
        token = (values % np.uint64(vocab)).astype(np.int32)
        for r in np.flatnonzero((step.row_flags & 1) & (step.row_target < 0)).tolist():
            slot = self._state[int(step.row_slot[r])]
            penalty = slot.hash(
                float(abs(step.frequency[r]) + abs(step.presence[r])), float(step.repetition[r])
            )
            token[r] = choose(int(values[r]) + penalty, vocab, slot.bias)
        self._constrain(step, values, token, status)
        sampled = (step.row_target < 0) & (status == 0)
        token[status != 0] = 0
        self._last[step.row_slot[sampled]] = token[sampled]
        for r in np.flatnonzero(sampled & ((step.row_flags & 1) != 0)).tolist():
            counts = self._state[int(step.row_slot[r])].counts
            counts[int(token[r])] = counts.get(int(token[r]), 0) + 1
        token = np.where(step.row_target >= 0, step.row_target, token).astype(np.int32)
        return self._outputs(step, state, token, status, rows)

    def _constrain(self, step: StepInput, values: U64, token: I32, status: I32) -> None:
        """Rows with a mask take one of its tokens."""
        if step.row_mask is None or step.masks is None:
            return
        for r in np.flatnonzero((step.row_mask >= 0) & (step.row_target < 0)).tolist():
            slot = self._state[int(step.row_slot[r])]
            bias = slot.bias if step.row_flags[r] & 1 else {}
            among = allowed(step.masks[step.row_mask[r]], self.capacity.vocab)
            token[r] = choose(int(values[r]), self.capacity.vocab, bias, among)
            if token[r] < 0 and not status[r]:
                status[r] = 2

    def _outputs(
        self, step: StepInput, state: U64, token: I32, status: I32, rows: int
    ) -> StepOutput:
        wanted = (step.row_flags & 2) != 0
        logprob = np.full(rows, np.nan, np.float32)
        top_ids = np.zeros((rows, TOP), np.int32)
        top_logprobs = np.full((rows, TOP), np.nan, np.float32)
        if wanted.any():
            logprob[wanted] = logprobs(state[wanted], token[wanted])
            for r in np.flatnonzero(wanted & (step.row_top > 0)).tolist():
                k = int(step.row_top[r])
                ids = (
                    int(state[r] % np.uint64(self.capacity.vocab)) + np.arange(k)
                ) % self.capacity.vocab
                top_ids[r, :k] = ids
                top_logprobs[r, :k] = logprobs(np.repeat(state[r : r + 1], k), ids.astype(np.int32))
        return StepOutput(
            token=token,
            logprob=logprob,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            status=status,
            seconds=self._step_s,
        )

    def _check_keys(self, step: StepInput, chained: U64) -> None:
        """Every key a sequence can see stands at its position, and together they are its text, of
        one rope where that is a whole sequence's."""
        size, rule = self.capacity.page_size, self.capacity.rope_rule
        for s, length in enumerate(step.seq_len.tolist()):
            at = np.arange(length)
            keys = step.pages[s][at // size].astype(np.int64) * size + at % size
            need((self._position[keys] == at).all(), "a visible key of another position")
            last = chained[step.seq_start[s + 1] - 1]
            need(self._hash[keys[-1]] == last, "a key of another text")
            if rule is not None and rule.of != "token":
                need((self._rope[keys] == self._rope[keys[-1]]).all(), "a key of another rope")

    def _edit(self, edits: I32) -> None:
        for slot, token, kind, value in edits.tolist():
            state = self._state[slot]
            if kind == CLEAR:
                self._state[slot] = TokenState()
            elif kind == MARK:
                state.marks.add(token)
            elif kind == COUNT:
                state.counts[token] = state.counts.get(token, 0) + value
            else:
                state.bias[token] = float(np.int32(value).view(np.float32))


def logprobs(state: U64, token: I32) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return -((mix(state + mix(token)) % np.uint64(1000)).astype(np.float32) + 1) / np.float32(
            100
        )


# What the null device offers without an artifact.
ALONE = Capacity(
    context=4096,
    vocab=32000,
    page_size=16,
    pages=4096,
    max_seqs=64,
    max_tokens=512,
    slots=64,
    edits=4096 + 2048,
)


def null_capacity(artifact: Artifact | None, kv_tokens: int | None) -> Capacity:
    """The artifact's sizes; the KV pool, which costs nothing here, holds `kv_tokens` or every
    sequence at full length.
    """
    if artifact is None:
        pages = ALONE.pages if kv_tokens is None else max(kv_tokens // ALONE.page_size, 1)
        context = min(ALONE.context, pages * ALONE.page_size)
        return replace(ALONE, pages=pages, context=context)
    m = artifact.manifest
    size = m.state.page_size
    most = -(-m.model.context // size) * m.max_seqs
    pages = min(most, 1 << 20) if kv_tokens is None else max(kv_tokens // size, 1)
    return Capacity(
        context=min(m.model.context, pages * size),
        vocab=m.model.vocab,
        page_size=size,
        pages=pages,
        max_seqs=m.max_seqs,
        max_tokens=m.max_tokens,
        slots=m.state.slots,
        edits=m.edits,
        embedding=m.model.embedding.dim if m.model.embedding else 0,
        whole=bool(m.model.embedding and m.model.embedding.whole),
        rope_rule=m.model.rope_rule,
    )
