"""Is the measuring client itself the bottleneck? Watches its event loop and its CPU time during a
run.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np

INTERVAL = 0.01
LAG_MS, CPU_SHARE = 20.0, 0.9


class LoopWatch:
    """`async with LoopWatch() as watch`: afterwards `p99_ms` and `cpu` say how late the loop ran
    and how busy the process was."""

    p99_ms = 0.0
    cpu = 0.0

    async def __aenter__(self) -> LoopWatch:
        self._late: list[float] = []
        self._start = time.perf_counter(), time.process_time()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        elapsed = time.perf_counter() - self._start[0]
        self.cpu = (time.process_time() - self._start[1]) / max(elapsed, 1e-9)
        if self._late:
            self.p99_ms = float(np.percentile(self._late, 99)) * 1000

    async def _run(self) -> None:
        while True:
            due = time.perf_counter() + INTERVAL
            await asyncio.sleep(INTERVAL)
            self._late.append(time.perf_counter() - due)

    def warnings(self) -> list[str]:
        """What the reader of the result must know."""
        out = []
        if self.p99_ms > LAG_MS:
            out.append(
                f"the client's own event loop ran {self.p99_ms:.0f} ms late (p99, limit "
                f"{LAG_MS:.0f}): latencies include the client; use fewer streams or a free machine"
            )
        if self.cpu > CPU_SHARE:
            out.append(
                f"the client used {self.cpu:.0%} of a core (limit {CPU_SHARE:.0%}): it may be "
                "the bottleneck"
            )
        return out
