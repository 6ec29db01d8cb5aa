"""Process start to first token: `python -m bench.startup artifact=… repeat=5`.

Starts runtime.serve as a user would, waits for its ready line, asks for one token, reads the
engine's own phases, stops it; again and again. Out: a timeline of medians and one JSON line. One
start before the measured ones warms the page cache.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median

from bench import results
from bench.errors import BenchError
from bench.server import Server
from conf.bench_schema import StartupConfig
from conf.load import run
from runtime.artifact import Artifact

BODY = json.dumps(
    {"input_ids": [1, 2, 3, 4], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
).encode()


def start_once(config: StartupConfig) -> dict[str, float]:
    """Seconds since the start of the process, by event."""
    with Server(config.artifact, config.serve, config.timeout) as server:
        status, answer = server.request("POST", "/generate", BODY)
        first = time.perf_counter()
        if status != 200:
            raise BenchError(
                f"/generate answered {status}: {answer[:200].decode(errors='replace')}"
            )
        engine = {f"engine {name}": seconds for name, seconds in server.phases().items()}
        return {
            **engine,
            "ready": server.ready - server.started,
            "first token": first - server.started,
        }


def timeline(title: str, runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Prints the events of all runs as a table; their medians."""
    print(f"{title:<32}{'median':>9}{'best':>9}{'worst':>9}")
    medians = {}
    for name in runs[0]:
        values = [r[name] for r in runs]
        medians[name] = median(values)
        print(f"{name:<32}{medians[name]:>9.3f}{min(values):>9.3f}{max(values):>9.3f}")
    return medians


def main(config: StartupConfig, sources: Mapping[str, str]) -> int:
    results.warn_if_busy()
    digest = Artifact.open(config.artifact).digest
    start_once(config)
    runs = [start_once(config) for _ in range(config.repeat)]
    medians = timeline("seconds since process start", runs)
    result = {"repeat": config.repeat, "median_seconds": medians, "runs": runs}
    results.append(config.output_file, results.stamp("startup", result, artifact=digest))
    return 0


if __name__ == "__main__":
    sys.exit(run(StartupConfig, "bench/startup", main))
