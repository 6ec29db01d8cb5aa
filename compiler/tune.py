"""`python -m compiler.tune model=<name> target=<gpu> [option=value …]`: measures which kernel and
configuration is best for every call of a model on this machine's GPU, and writes the choices to
`kernels/tuned/<gpu>.json`.

Calls of the buckets that matter most come first and are searched (tune_search.py); the others try
what was best in those. Candidates are built by other processes while one process measures
(tune_worker.py): one that hangs or faults is ended with it, recorded as failed, and the rest goes
on. A candidate that does not compute what the default computes is left out. Then the close
contenders of a call are tried in the whole step and the fastest step decides. Ends at `limit`; what
was not measured keeps the heuristic's choice. The records are written after every call, and a later
run goes on where this one ended.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from compiler.design import Draft, draft, nodes_of
from compiler.importer import import_resolved
from compiler.lower import Node, label
from compiler.measure import Candidate, Task, candidate, tasks
from compiler.progress import Progress
from compiler.tune_search import Search
from compiler.tuned import FOLDER, Records, call_key, load_records, save_records
from compiler.worker_process import WorkerLost, WorkerProcess
from conf.errors import ConfigError
from conf.load import run
from conf.options import group_choices
from conf.schema import TuneConfig
from kernels.cuda.build import Builders, build_cuda, versions
from kernels.launch import Source
from kernels.toolchain import ToolchainError
from runtime.artifact import Bucket
from runtime.device.driver import version

NO_USE = ("out", "name", "accuracy.max_delta", "accuracy.measure")  # options of a compile alone
# Buckets whose calls are searched, the most valuable first; the others try what was best in these.
ANCHORS = ("d1", "t8192", "d256", "d32", "d8", "d128", "t1024", "t4096", "t256")
FIRST_OPS = ("linear", "linear_rope_kv", "attention")  # most of a step's time
WINDOW = 6  # calls whose candidates are being built while another's are measured
CLOSE = 1.05  # contenders: at most so much slower than the best
STEADY = 1.01  # a whole step must gain so much to change a choice
CALLS_SHARE = 0.8  # of the time; the rest is for whole steps
GIVEN_UP = 5  # candidates of a kernel that hang or fault before the rest of them is left out
PREPARE_S, STEP_S = 40.0, 30.0  # to fill a call's buffers, to run a whole step


def main(config: TuneConfig, sources: Mapping[str, str]) -> None:
    if config.target.kind != "cuda":
        raise ConfigError(
            f"target={config.target.name}: only GPUs are tuned; name the GPU of this machine, "
            "target=h200 or target=h100"
        )
    for key in NO_USE:
        if sources.get(key) == "override":
            raise ConfigError(f"{key}: does nothing here, nothing is published; leave it out")
    deadline = time.monotonic() + 60 * config.limit
    progress = Progress()
    model, resolved, _ = import_resolved(config, sources)
    assert isinstance(resolved, TuneConfig)
    base = draft(model.spec, resolved)
    job = {"config": msgspec.to_builtins(resolved)}
    with WorkerProcess([sys.executable, "-m", "compiler.tune_worker"], job) as process:
        check_gpu(config.target.name, process.hello["gpu"])
        tuner = Tuner(base, resolved, process, progress, deadline)
        records = tuner.run()
    path = save_records(records, config.records)
    progress.show(f"{len(records.entries)} records in {path}")


def check_gpu(target: str, gpu: str) -> None:
    """Records are kept by target: those of another GPU would pass for its."""
    for other in group_choices("target"):
        if other != target and other in gpu.lower():
            raise ConfigError(
                f"target={target}: this machine's GPU is {gpu}, its records are those of "
                f"target={other}"
            )


@dataclass(slots=True)
class Open:
    """A call under search, and the round that is being built."""

    search: Search
    round: list[Candidate]
    building: list[Future[None]]

    @property
    def ready(self) -> bool:
        return all(future.done() for future in self.building)


class Tuner:
    def __init__(
        self,
        base: Draft,
        config: TuneConfig,
        process: WorkerProcess,
        progress: Progress,
        deadline: float,
    ) -> None:
        self.base, self.config, self.process, self.progress = base, config, process, progress
        self.deadline = deadline
        self.calls_end = deadline - (1 - CALLS_SHARE) * 60 * config.limit
        self.cache, self.arch = Path(config.cache).expanduser(), str(config.target.arch)
        hello = process.hello
        self.versions = {**versions(), "gpu": hello["gpu"], "driver": version(hello["driver"])}
        self.records = load_records(config.target.name, config.records)
        if self.records.versions != self.versions:
            if self.records.entries:
                where = config.records or FOLDER
                progress.show(f"records of other versions in {where} are given up")
            self.records = Records(gpu=config.target.name, versions=self.versions)
        self.known = dict(self.records.entries)
        self.ranked: dict[str, list[tuple[float, Candidate]]] = {}
        self.winners: dict[str, list[tuple[Bucket, Mapping[str, Any]]]] = {}
        self.anchors = anchors(base.buckets)
        self.lost: Counter[str] = Counter()
        self.left_out: list[str] = []
        self.missed = 0

    def run(self) -> Records:
        """What was measured now, over what was known before."""
        todo = []
        for task in ordered(self.base, self.config.ops):
            entry = self.known.get(task.key)
            if self.config.again:
                todo.append(task)
            elif entry is not None and not entry.get("partial"):
                self.winners.setdefault(name_of(task), []).append((task.bucket, entry))
            elif task.candidates[0].name in self.records.failed.get(task.key, {}):
                self.left_out.append(f"{name_of(task)} in {task.bucket.name}: its default failed")
            else:
                todo.append(task)
        try:
            with self.progress.stage("calls"), Builders(self.cache, self.arch) as builders:
                self.search(todo, builders)
        finally:  # a build that is under way is nobody's any more
            for child in multiprocessing.active_children():
                child.terminate()
        with self.progress.stage("steps"):
            for bucket in self.base.buckets:
                if bucket.name in self.anchors and time.monotonic() < self.deadline:
                    self.settle(bucket)
        if self.missed:
            self.progress.show(
                f"time    {self.missed} of {len(todo)} calls were not measured within "
                f"limit={self.config.limit:g}; run it again to go on"
            )
        for reason in dict.fromkeys(self.left_out):
            self.progress.show(f"without {reason}")
        return self.records

    # --- calls ----------------------------------------------------------------------------------

    def search(self, todo: Sequence[Task], builders: Builders) -> None:
        waiting, window = deque(todo), list[Open]()
        while (waiting or window) and time.monotonic() < self.calls_end:
            while waiting and len(window) < WINDOW:
                wide = waiting[0].bucket.name in self.anchors
                if not wide and any(o.search.wide for o in window):
                    break  # begins with what will be best there
                task = waiting.popleft()
                search = Search(task, self.near(task), wide=wide)
                window.append(self.opened(search, builders))
            open = next((o for o in window if o.ready), None)
            if open is None:
                futures = [f for o in window for f in o.building if not f.done()]
                wait(futures, self.calls_end - time.monotonic(), FIRST_COMPLETED)
                continue
            whole = self.measure(open)
            window.remove(open)
            again = self.opened(open.search, builders) if whole else None
            if again is not None and again.round:
                window.append(again)
            else:
                self.note(open.search, partial=time.monotonic() > self.calls_end)
        for open in window:  # what there is of a call that was begun counts until a later run
            self.note(open.search, partial=True)
        self.missed = len(waiting) + sum(not open.search.seconds for open in window)

    def opened(self, search: Search, builders: Builders) -> Open:
        shape = search.task.node.shape
        chosen = [
            c
            for c in search.wanted()
            if c is search.task.candidates[0] or self.lost[c.kernel.name] < GIVEN_UP
        ]
        failed = self.records.failed.get(search.task.key, {})
        chosen = [c for c in chosen if c.name not in failed or self.config.again]
        sources = dict.fromkeys(s for c in chosen for s in c.sources(shape))
        return Open(search, chosen, [builders.submit(source) for source in sources])

    def near(self, task: Task) -> list[Candidate]:
        """What a search that was cut short found best, and what was best for the same call in the
        buckets of the nearest sizes."""

        def far(pair: tuple[Bucket, Mapping[str, Any]]) -> tuple[bool, float]:
            other, size = pair[0], task.bucket.tokens
            return other.kind != task.bucket.kind, max(other.tokens / size, size / other.tokens)

        own = self.known.get(task.key)
        others = sorted(self.winners.get(name_of(task), []), key=far)[:3]
        entries = [*([own] if own else []), *(entry for _, entry in others)]
        found = (candidate(task, entry) for entry in entries)
        return [one for one in found if one is not None]

    def measure(self, open: Open) -> bool:
        """The round's candidates, one by one. False: there is no more to be had of this call."""
        task, search = open.search.task, open.search
        first, shape = task.candidates[0], task.node.shape
        job = {"task": [task.bucket.name, task.key]}
        try:
            if not self.usable(first, shape, default=True):
                return False
            answer = self.process.ask(job, PREPARE_S + self.config.hang)
        except WorkerLost as lost:
            self.fail(task, first, lost)
            return False
        if "seconds" not in answer:
            self.left_out.append(f"{label(task.node.call)} in {task.bucket.name}: {answer}")
            return False
        search.tell(first, answer["seconds"])
        for one in open.round:
            if one == first:
                continue
            if time.monotonic() > self.calls_end:
                return False
            if self.lost[one.kernel.name] >= GIVEN_UP or not self.usable(one, shape):
                continue
            ask = {**one.entry(0.0), "us": None}
            try:
                answer = self.process.ask({"candidate": ask, "best": search.best}, self.config.hang)
            except WorkerLost as lost:
                self.fail(task, one, lost)
                try:
                    self.process.ask(job, PREPARE_S + self.config.hang)
                except WorkerLost as again:
                    self.fail(task, first, again)
                    return False
                continue
            search.tell(one, answer.get("seconds"))
            if "refused" in answer:
                self.left_out.append(f"{one.name} for {label(task.node.call)}: {answer['refused']}")
        return True

    def usable(self, one: Candidate, shape: Any, default: bool = False) -> bool:
        """Built, and not spilling registers: such a candidate never wins, and there are many."""
        try:
            built = build_cuda(one.sources(shape), self.cache, self.arch)
        except ToolchainError as error:
            self.left_out.append(str(error).splitlines()[0])
            return False
        return default or not any(binary.stack for binary, _ in built.values())

    def fail(self, task: Task, one: Candidate, lost: WorkerLost) -> None:
        """It hung, or took the device down: written at once, so that no later run tries it."""
        self.lost[one.kernel.name] += 1
        self.left_out.append(f"{one.name} for {label(task.node.call)}: {lost}")
        known = self.records.failed
        mine = {**known.get(task.key, {}), one.name: str(lost)}
        self.records = replace(self.records, failed={**known, task.key: mine})
        save_records(self.records, self.config.records)

    def note(self, search: Search, *, partial: bool = False) -> None:
        if not search.seconds:
            return
        task, ranked = search.task, search.ranked
        self.ranked[task.key] = ranked
        rest = {"partial": True} if partial else {}
        self.enter(task.key, {**ranked[0][1].entry(ranked[0][0]), **rest})
        entry = self.records.entries[task.key]
        self.winners.setdefault(name_of(task), []).append((task.bucket, entry))
        first = search.seconds.get(task.candidates[0])
        self.progress.show(
            f"{task.bucket.name:<7}{label(task.node.call):<24}{ranked[0][0] * 1e6:9.2f} us of "
            f"{len(ranked):>3}, default {(first or 0) * 1e6:9.2f}  {ranked[0][1].name}"
        )

    def enter(self, key: str, entry: Mapping[str, Any]) -> None:
        self.records = replace(self.records, entries={**self.records.entries, key: entry})
        save_records(self.records, self.config.records)

    # --- whole steps ----------------------------------------------------------------------------

    def settle(self, bucket: Bucket) -> None:
        """Tries the close contenders of each call in the whole step of the bucket."""
        nodes = nodes_of(self.base.program, self.base.weights, bucket, "cuda", self.records)
        contested = [
            (call_key(node.shape), self.ranked[call_key(node.shape)])
            for node in nodes
            if call_key(node.shape) in self.ranked
        ]
        if not contested:
            return
        best = self.step(bucket, nodes, self.records)
        if best is None:
            return
        for key, options in dict(contested).items():
            for seconds, one in options[1 : 1 + self.config.contenders]:
                if seconds > options[0][0] * CLOSE or time.monotonic() > self.deadline:
                    break
                rest = {k: v for k, v in self.records.entries[key].items() if k == "partial"}
                entry = {**one.entry(seconds), **rest}
                trial = replace(self.records, entries={**self.records.entries, key: entry})
                took = self.step(bucket, nodes, trial)
                if took is not None and took * STEADY < best:
                    best = took
                    self.enter(key, entry)
        self.progress.show(f"step {bucket.name}: {best * 1e6:.1f} us")

    def step(self, bucket: Bucket, nodes: Iterable[Node], records: Records) -> float | None:
        sources: list[Source] = [x.source for n in nodes for x in n.launches if x.source]
        build_cuda(sources, self.cache, self.arch)
        keys = {call_key(node.shape) for node in nodes}
        entries = {key: entry for key, entry in records.entries.items() if key in keys}
        try:
            answer = self.process.ask({"step": bucket.name, "entries": entries}, STEP_S)
        except WorkerLost as lost:
            self.left_out.append(f"the step {bucket.name}: {lost}")
            return None
        seconds: float | None = answer.get("seconds")
        return seconds


def name_of(task: Task) -> str:
    """The same for the same call in every bucket."""
    return label(task.node.call)


def anchors(buckets: Sequence[Bucket]) -> list[str]:
    """ANCHORS, and the largest bucket of each kind, the most valuable first."""
    largest = {bucket.kind: bucket.name for bucket in buckets}
    names = {bucket.name for bucket in buckets}
    return list(dict.fromkeys(n for n in (*ANCHORS, *largest.values()) if n in names))


def ordered(base: Draft, ops: Sequence[str] = ()) -> list[Task]:
    """Calls that have a choice: those of the anchors first, among them the costly ops of each."""
    first = anchors(base.buckets)
    buckets = sorted(
        base.buckets, key=lambda b: first.index(b.name) if b.name in first else len(first)
    )
    found = [t for t in tasks(base, buckets, ops) if len(t.candidates) > 1]

    def rank(pair: tuple[int, Task]) -> tuple[bool, bool, int]:
        number, task = pair
        costly = task.node.call.op in FIRST_OPS
        return not (task.bucket.name in first and costly), not costly, number

    return [task for _, task in sorted(enumerate(found), key=rank)]


if __name__ == "__main__":
    sys.exit(run(TuneConfig, "tune", main))
