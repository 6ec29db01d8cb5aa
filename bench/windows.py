"""Step times that can be trusted: means over a few consecutive steps. Used by `bench.static_batch`,
`bench.latency` and `bench.peers`.
"""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 8


def windows(steps: Sequence[float]) -> list[float]:
    """Mean step of every `WINDOW` consecutive ones. An engine that overlaps host and device hands
    out the result of a step late and that of the next at once: single intervals say nothing, their
    sums do.
    """
    size = min(WINDOW, len(steps))
    starts = range(0, len(steps) - size + 1, size)
    return [sum(steps[i : i + size]) / size for i in starts]
