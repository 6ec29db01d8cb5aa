"""Measures for `compiler.tune` in a process of its own (worker_process.py).

Comes in: first {config}, resolved, then jobs. Goes out: what each took in seconds, or why a
candidate is refused. Jobs:
{"task": [bucket, key]} prepares a call and measures its default; {"candidate": {kernel, config},
"best": seconds} measures another of the same call; {"step": bucket, "entries": …} a whole step.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from compiler.design import draft
from compiler.importer import import_model
from compiler.measure import Candidate, Meter, Task, TimedCall, candidate, tasks
from compiler.tuned import Records
from compiler.worker_process import Questions
from conf.schema import TuneConfig
from runtime.device.launcher import Launcher


class Worker:
    def __init__(self, config: TuneConfig, launcher: Launcher) -> None:
        self.gpu = launcher.gpu
        self.base = draft(import_model(config).spec, config)
        self.meter = Meter(
            launcher,
            self.base,
            context=config.context,
            memory_gib=config.memory_gib,
            rounds=config.rounds,
            cache=Path(config.cache),
            arch=str(config.target.arch),
        )
        self.buckets = {bucket.name: bucket for bucket in self.base.buckets}
        self.task: Task | None = None
        self.timed: TimedCall | None = None

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        if "task" in job:
            bucket, key = job["task"]
            found = (t for t in tasks(self.base, [self.buckets[bucket]]) if t.key == key)
            self.task = next(found)
            self.timed = self.meter.call(self.task)
            return self.measure(self.task.candidates[0], math.inf)
        if "candidate" in job:
            assert self.task is not None
            one = candidate(self.task, job["candidate"])
            assert one is not None, f"no candidate {job['candidate']}"
            return self.measure(one, job["best"])
        self.task = self.timed = None  # the step takes their memory
        records = Records(entries=job["entries"])
        return {"seconds": self.meter.step(self.buckets[job["step"]], records)}

    def measure(self, one: Candidate, best: float) -> dict[str, Any]:
        assert self.timed is not None
        calls = self.timed.calls(one)
        if reason := self.timed.differs(calls):
            return {"refused": reason}
        return {"seconds": self.timed.seconds(calls, best)}


def main() -> None:
    questions = Questions()
    config = msgspec.convert(questions.first["config"], TuneConfig)
    with Launcher(config.gpu) as launcher:
        worker = Worker(config, launcher)
        questions.tell({"gpu": worker.gpu.name, "driver": worker.gpu.driver})
        for job in questions:
            try:
                answer = worker.run(job)
            except Exception as error:  # noqa: BLE001 - of one candidate; a lost device ends all
                launcher.fill(worker.meter.state, 1)
                answer = {"refused": f"{type(error).__name__}: {error}"[:300]}
            questions.tell(answer)


if __name__ == "__main__":
    main()
