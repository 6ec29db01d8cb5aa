"""Measures for `compiler.tune` in a process of its own: a kernel that hangs or faults takes the
driver's context with it, so the process is ended and another one goes on.

Comes in, on stdin, a line of JSON each: first {config}, resolved, then jobs. Goes out, on stdout, a
line for each: what a job took in seconds, or why a candidate is refused. Jobs:
{"task": [bucket, key]} prepares a call and measures its default; {"candidate": {kernel, config},
"best": seconds} measures another of the same call; {"step": bucket, "entries": …} a whole step.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from compiler.design import draft
from compiler.importer import import_model
from compiler.measure import Candidate, Meter, Task, TimedCall, candidate, tasks
from compiler.tuned import Records
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
    # Whatever a library prints goes to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    config = msgspec.convert(json.loads(sys.stdin.readline())["config"], TuneConfig)
    with Launcher(config.gpu) as launcher:
        worker = Worker(config, launcher)
        print(json.dumps({"gpu": worker.gpu.name, "driver": worker.gpu.driver}), file=answers)
        for line in sys.stdin:
            try:
                answer = worker.run(json.loads(line))
            except Exception as error:  # noqa: BLE001 - of one candidate; a lost device ends all
                launcher.fill(worker.meter.state, 1)
                answer = {"refused": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
