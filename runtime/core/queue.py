"""The waiting line: who is next, under which policy.

Comes in: sequences, new or preempted. Goes out: candidates for admission, best first. Priority
first, then by policy: `fcfs` is arrival order; `lpm` prefers the longest prefix already in the
pool. A sequence others have passed PATIENCE times goes before all of its layer, so nobody waits for
ever. Used by the scheduler.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator

from runtime.core.policy import Policy
from runtime.core.sequence import Sequence

WINDOW = 64  # how far lpm looks: what it costs per step stays bounded
PATIENCE = 32


def _place(seq: Sequence) -> tuple[int, int]:
    return -seq.request.priority, seq.arrival


class WaitingLine:
    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._line: list[Sequence] = []
        self.tokens = 0  # prompt tokens (and known outputs) that wait

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    def put(self, seq: Sequence) -> None:
        insort(self._line, seq, key=_place)
        self.tokens += len(seq.tokens)

    def remove(self, seq: Sequence) -> None:
        self._line.remove(seq)
        self.tokens -= len(seq.tokens)

    def full(self, policy: Policy, tokens: int, free: int) -> bool:
        """No room for a prompt of `tokens`; `free` of those that wait will not for long."""
        if len(self._line) >= policy.waiting_requests + free:
            return True
        return bool(self._line) and self.tokens + tokens > policy.waiting_tokens

    def candidates(self, matched: Callable[[Sequence], int]) -> list[Sequence]:
        window = self._line[:WINDOW]
        if self._policy == "fcfs" or len(window) < 2:
            return window
        rank = {
            id(seq): (
                -seq.request.priority,
                seq.passed < PATIENCE,
                -matched(seq) if seq.passed < PATIENCE else 0,
                seq.arrival,
            )
            for seq in window
        }
        return sorted(window, key=lambda seq: rank[id(seq)])
