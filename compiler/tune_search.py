"""Which candidates of a call to build and measure next: a search instead of all of them.

A call has hundreds of candidates and a GPU minute is dear. First come the default, the choices that
were best for the same weight in other buckets, and a few of every kernel, far from one another;
then, round by round, the nearest to the best of a kernel. A kernel whose round brought nothing is
done. Candidates of several thread blocks a cluster come after those of one: they are the ones that
may hang. Called by `compiler.tune`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from compiler.measure import Candidate, Task

MOST = 64  # candidates of a call
SPREAD = 5  # of a kernel to begin with
ROUND = 10  # of a kernel's nearest at a time
PROMISING = 1.25  # a kernel whose best is at most so much slower than the best is searched on
GAIN = 1.005  # what a round must bring


class Search:
    """`wanted()` gives the next round, `tell` takes what each of it took (None: it does not
    count). `near`: candidates to begin with. `wide`: search on from there."""

    def __init__(self, task: Task, near: Iterable[Candidate] = (), *, wide: bool = True) -> None:
        self.task, self.wide = task, wide
        self.seconds: dict[Candidate, float] = {}  # of what was measured
        self._told: set[Candidate] = set()
        self._asked: set[Candidate] = set()
        self._place = {c: fields(asdict(c.config)) for c in task.candidates}
        self._before: dict[str, float] = {}  # the best of each kernel before its last round
        spread: list[Candidate] = []
        if wide:
            for kernel in dict.fromkeys(c.kernel.name for c in task.candidates):
                spread += self._spread([c for c in task.candidates if c.kernel.name == kernel])
        self._next = list(dict.fromkeys((task.candidates[0], *near, *spread)))

    def wanted(self) -> list[Candidate]:
        """Empty when there is nothing more to try."""
        if not self._next and self.wide and len(self._asked) < MOST:
            self._next = self._neighbours()
        found, self._next = self._next, []
        self._asked |= set(found)
        return found

    def tell(self, candidate: Candidate, seconds: float | None) -> None:
        self._told.add(candidate)
        if seconds is not None:
            self.seconds[candidate] = seconds

    @property
    def ranked(self) -> list[tuple[float, Candidate]]:
        """Best first."""
        pairs = [(seconds, candidate) for candidate, seconds in self.seconds.items()]
        return sorted(pairs, key=lambda pair: pair[0])

    @property
    def best(self) -> float:
        return min(self.seconds.values(), default=math.inf)

    def _spread(self, all: list[Candidate]) -> list[Candidate]:
        """A kernel's first and those farthest from what is chosen, again and again."""
        safe = [c for c in all if self._clusters(c) == 1]
        chosen, far = [all[0]], {c: self._distance(c, all[0]) for c in safe}
        while len(chosen) < SPREAD and any(far.values()):
            chosen.append(max(far, key=far.__getitem__))
            far = {c: min(d, self._distance(c, chosen[-1])) for c, d in far.items()}
        return chosen

    def _neighbours(self) -> list[Candidate]:
        bests: dict[str, tuple[float, Candidate]] = {}
        for seconds, candidate in self.ranked:
            if seconds <= PROMISING * self.best:
                bests.setdefault(candidate.kernel.name, (seconds, candidate))
        found: list[Candidate] = []
        for kernel, (seconds, best) in bests.items():
            if self._before.get(kernel, math.inf) < seconds * GAIN:
                continue
            self._before[kernel] = seconds
            rest = [
                c for c in self.task.candidates if c.kernel.name == kernel and c not in self._asked
            ]
            rest.sort(key=lambda c: (self._distance(c, best), self._clusters(c)))
            found += sorted(rest[:ROUND], key=self._clusters)
        return found[: MOST - len(self._asked)]

    def _distance(self, a: Candidate, b: Candidate) -> float:
        return _distance(self._place[a], self._place[b])

    def _clusters(self, candidate: Candidate) -> int:
        return max((s.ctas for s in candidate.sources(self.task.node.shape)), default=1)


def fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's fields, those of configurations within it too."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= fields(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Doublings between numbers; one for what is no number or only zero in one of them."""
    total = 0.0
    for key in {*a, *b}:
        one, other = a.get(key), b.get(key)
        if one == other:
            continue
        numbers = (type(one) is int and type(other) is int) and (one > 0 and other > 0)
        total += abs(math.log2(one / other)) if numbers else 1.0  # type: ignore[operator]
    return total
