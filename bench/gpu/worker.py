"""One section of `bench.gpu` in a process of its own: `python -m bench.gpu.worker`.

Comes in, on stdin: {section, config, model, artifact} as JSON. Goes out: the figures as the last
line of stdout, or an error on stderr and exit code 1.
"""

from __future__ import annotations

import json
import sys

from bench.gpu.sections import SECTIONS
from conf.bench_schema import GpuConfig


def main() -> int:
    job = json.load(sys.stdin)
    section = next(s for s in SECTIONS if s.name == job["section"])
    try:
        figures = section.run(GpuConfig(**job["config"]), job["model"], job["artifact"])
    except Exception as error:  # noqa: BLE001 - told to the parent, which goes on
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
