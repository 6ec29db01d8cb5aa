"""One section of `bench.gpu` in a process of its own: `python -m bench.gpu.worker`.

Comes in, on stdin: {section, config, model, artifact} as JSON. Goes out: the figures as the last
line of stdout (of a section with several parts a line after each), or an error on stderr and exit
code 1.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

from bench.gpu.sections import SECTIONS
from conf.bench_schema import GpuConfig


def main() -> int:
    job = json.load(sys.stdin)
    section = next(s for s in SECTIONS if s.name == job["section"])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    try:
        found = section.run(GpuConfig(**job["config"]), job["model"], job["artifact"])
        for figures in [found] if isinstance(found, dict) else found:
            print(json.dumps(figures), file=answers)
    except Exception as error:  # noqa: BLE001 - told to the parent, which goes on
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
