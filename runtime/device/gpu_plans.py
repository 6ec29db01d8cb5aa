"""The plans of an artifact as graphs, most useful first, the rest while steps already run.

A thread makes one graph after the other. `fitting` gives the cheapest one that stands and serves a
step; only when none does it waits for one that will. Called by the CUDA session.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from runtime.artifact import Bucket
from runtime.device.gpu_graph import Graph
from runtime.device.staging import Demand, PlanIo, by_cost, none_fits


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """A plan ready to run."""

    bucket: Bucket
    graph: Graph
    io: PlanIo


def most_useful_first(buckets: tuple[Bucket, ...]) -> tuple[list[Bucket], int]:
    """All buckets in the order they are made, and how many of them a session cannot start without:
    the one that serves every step, and the one for a single sequence that decodes."""
    cheapest = by_cost(buckets)
    decode = [b for b in cheapest if b.kind == "decode"]
    mixed = [b for b in cheapest if b.kind != "decode"]
    first = [*mixed[-1:], *decode[:1]]
    return [*first, *decode[1:], *mixed[:-1]], len(first)


class PlanSet:
    """`make(bucket)` may take milliseconds and runs in a thread of its own, after `prepare()`."""

    def __init__(
        self,
        buckets: tuple[Bucket, ...],
        make: Callable[[Bucket], GpuPlan],
        prepare: Callable[[], None],
    ) -> None:
        order, self._needed = most_useful_first(buckets)
        self._order, self._make, self._prepare = order, make, prepare
        self._by_cost = by_cost(buckets)
        self._rank = {b.name: i for i, b in enumerate(self._by_cost)}
        self._ready: tuple[GpuPlan, ...] = ()  # by cost; replaced, never changed
        self.seconds: dict[str, float] = {}  # to make each, by name of the bucket
        self._error: BaseException | None = None
        self._stop = False
        self._over = False  # the thread makes no more
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="plans", daemon=True)
        self._thread.start()

    def fitting(self, step: Demand) -> GpuPlan:
        """Raises ValueError if no plan of the artifact serves the step, and what went wrong in the
        making of the one that would."""
        if (plan := self._find(step)) is not None:
            return plan
        if not any(step.fits(b) for b in self._by_cost):
            raise none_fits(step, self._by_cost)
        with self._news:
            self._news.wait_for(lambda: self._find(step) is not None or self._over)
        if (plan := self._find(step)) is not None:
            return plan
        raise self._error or RuntimeError("the session is closed")

    def wait(self, *, all: bool = False) -> None:
        """Until steps can run, or until every plan stands. Raises what went wrong."""
        wanted = len(self._order) if all else self._needed
        with self._news:
            self._news.wait_for(lambda: len(self._ready) >= wanted or self._over)
        self.check()

    def check(self) -> None:
        """Raises what went wrong in the thread: a session lacking plans it promised is broken."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        for plan in self._ready:
            plan.graph.close()
        self._ready = ()

    def _find(self, step: Demand) -> GpuPlan | None:
        return next((plan for plan in self._ready if step.fits(plan.bucket)), None)

    def _run(self) -> None:
        try:
            self._prepare()
            for bucket in self._order:
                if self._stop:
                    return
                began = time.perf_counter()
                plan = self._make(bucket)
                self.seconds[bucket.name] = time.perf_counter() - began
                with self._news:
                    ready = [*self._ready, plan]
                    ready.sort(key=lambda p: self._rank[p.bucket.name])
                    self._ready = tuple(ready)
                    self._news.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised where steps are submitted
            self._error = error
        finally:
            with self._news:
                self._over = True
                self._news.notify_all()
