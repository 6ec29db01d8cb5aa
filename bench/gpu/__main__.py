"""All that needs a GPU, in one bounded run without a network: `python -m bench.gpu` (`make gpu`).

Correctness first (every kernel on the device, tokens beside the CPU's), then answers about the
driver, then the measurements of each model. A section that fails or takes too long is recorded and
the next one runs. Out: a short table, and one JSON document that also names what was not measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import results
from bench.errors import BenchUsage
from bench.gpu.sections import SECTIONS, Section
from conf.bench_schema import GpuConfig
from conf.load import run
from conf.options import group_choices
from runtime.device.machine import gpu_names

RESULTS = Path("bench/results")
ERROR = 600  # characters of an error that are kept


def main(config: GpuConfig, sources: Mapping[str, str]) -> int:
    names = [s.name for s in SECTIONS]
    for name in config.sections:
        if name not in names:
            raise BenchUsage(f"sections: no {name!r}; choices: {', '.join(names)}")
    config = replace(config, hardware=config.hardware or target_name(gpu_names(), config.gpu))
    wanted = [s for s in SECTIONS if not config.sections or s.name in config.sections]
    deadline = time.monotonic() + config.seconds
    records: list[dict[str, Any]] = []

    def go(section: Section, model: str = "", artifact: str = "") -> dict[str, Any]:
        record = run_section(section, config, deadline, model, artifact)
        records.append(record)
        print(line(record), flush=True)
        return record

    for section in wanted:
        if not section.per_model:
            go(section)
    for model in config.models:
        artifact = config.artifacts.get(model, "")
        for section in wanted:
            if section.per_model:
                record = go(section, model, artifact)
                artifact = record.get("figures", {}).get("artifact", artifact)
    failed = [r for r in records if r["status"] != "done"]
    unmeasured = [f"{r['section']} {r['model']}".strip() for r in failed]
    document = results.stamp("gpu", {"sections": records, "unmeasured": unmeasured})
    path = Path(config.output_file) if config.output_file else result_path(str(config.hardware))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if unmeasured:
        print(f"not measured: {', '.join(unmeasured)}")
    print(path)
    return 1 if failed else 0


def target_name(names: list[str], index: int) -> str:
    """The target (conf/target) of a GPU's product name, e.g. `NVIDIA H200` -> h200."""
    known = [t for t in group_choices("target") if t not in ("auto", "cpu")]
    if index >= len(names):
        raise BenchUsage(
            f"gpu={index}: the kernel driver shows {len(names)} GPUs; give hardware=… of "
            f"{', '.join(known)} if one is there all the same"
        )
    for target in known:
        if target in names[index].lower():
            return target
    raise BenchUsage(f"no target for {names[index]}; give hardware=… of {', '.join(known)}")


def result_path(target: str) -> Path:
    return RESULTS / target / f"{time.strftime('%Y-%m-%d-%H%M')}.json"


def run_section(
    section: Section, config: GpuConfig, deadline: float, model: str, artifact: str
) -> dict[str, Any]:
    """`status`: done, failed, or skipped with the reason; `figures` when it is done."""
    record: dict[str, Any] = {"section": section.name, "model": model}
    left = deadline - time.monotonic()
    if section.per_model and section.needs and not artifact:
        return record | {"status": "skipped", "error": "no artifact"}
    if left < 1:
        return record | {"status": "skipped", "error": f"the {config.seconds:g} s are used up"}
    limit = min(section.seconds, left)
    job = {"section": section.name, "config": asdict(config), "model": model, "artifact": artifact}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # what it starts ends with it
        env=os.environ | {"CUDA_VISIBLE_DEVICES": str(config.gpu)},
    )
    try:
        out, errors = process.communicate(json.dumps(job), timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return record | {"status": "failed", "seconds": limit, "error": f"over {limit:.0f} s"}
    record["seconds"] = round(time.monotonic() - began, 2)
    if process.returncode:
        return record | {"status": "failed", "error": errors.strip()[-ERROR:]}
    return record | {"status": "done", "figures": json.loads(out.strip().splitlines()[-1])}


def line(record: dict[str, Any]) -> str:
    """One section in the table: its figures, or why there are none."""
    head = f"{record['section']:<10}{record['model']:<14}{record['status']:<8}"
    if record["status"] != "done":
        return f"{head}{record['error'].splitlines()[-1] if record['error'] else ''}"
    return f"{head}{record['seconds']:>6.1f} s  {summary(record['figures'])}"


def summary(figures: Mapping[str, Any]) -> str:
    parts = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            inner = summary({k: v for k, v in value.items() if isinstance(v, int | float | str)})
            parts.append(f"{name}({inner})")
        elif isinstance(value, float):
            parts.append(f"{name} {value:.4g}")
        elif isinstance(value, int | str):
            parts.append(f"{name} {value}")
    return ", ".join(parts)[:400]


if __name__ == "__main__":
    sys.exit(run(GpuConfig, "bench/gpu", main))
