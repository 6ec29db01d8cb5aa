"""All that needs a GPU, in one bounded run without a network: `python -m bench.gpu` (`make gpu`).

Correctness first (every kernel on the device, tokens beside the CPU's), then answers about the
driver, then the measurements of each model. A section that fails or takes too long is recorded and
the next one runs. Out: the table of goals, and one JSON document, written anew after every section,
that also names what was not measured.
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
from bench.gpu import answers, goals
from bench.gpu.sections import SECTIONS, Section, jobs
from conf.bench_schema import GpuConfig
from conf.load import run
from conf.options import group_choices
from runtime.device.machine import gpu_names

RESULTS = Path("bench/results")
WORKER = [sys.executable, "-m", "bench.gpu.worker"]
ERROR = 600  # characters of an error that are kept


def main(config: GpuConfig, sources: Mapping[str, str]) -> int:
    names = [s.name for s in SECTIONS]
    for name in config.sections:
        if name not in names:
            raise BenchUsage(f"sections: no {name!r}; choices: {', '.join(names)}")
    for model in config.artifacts:
        if model not in config.models:
            raise BenchUsage(f"artifacts.{model}: it is none of models={config.models}")
    deadline = time.monotonic() + config.seconds
    config = replace(config, hardware=config.hardware or target_name(gpu_name(config.gpu)))
    path = Path(config.output_file) if config.output_file else result_path(str(config.hardware))
    document = results.stamp("gpu", {"hardware": config.hardware, "sections": []})
    records: list[dict[str, Any]] = document["sections"]
    artifacts = dict(config.artifacts)
    for section, model in jobs(config):
        record = run_section(section, config, deadline, model, artifacts.get(model, ""))
        found = record.get("figures", {}).get("artifact")
        if found:
            artifacts[model] = found
        records.append(record)
        write(path, document)
        print(line(record), flush=True)
    failed = [f"{r['section']} {r['model']}".strip() for r in records if r["status"] != "done"]
    document = {
        **document,
        "unmeasured": failed,
        "goals": goals.reached(document),
        "answers": answers.answers(document),
    }
    write(path, document)
    print(goals.table(document["goals"]))
    print(answers.table(document["answers"]))
    if failed:
        print(f"not measured: {', '.join(failed)}")
    print(path)
    return 1 if failed else 0


def write(path: Path, document: Mapping[str, Any]) -> None:
    """The file is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def gpu_name(index: int) -> str:
    """As the kernel driver shows it, or (some sandboxes hide that) as the driver's library says."""
    names = gpu_names()
    if index < len(names):
        return names[index]
    code = (
        "from runtime.device.launcher import Launcher\n"
        f"with Launcher({index}) as launcher: print(launcher.gpu.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        known = ", ".join(t for t in group_choices("target") if t not in ("auto", "cpu"))
        raise BenchUsage(
            f"gpu={index}: no such GPU ({done.stderr.strip().splitlines()[-1]}); give hardware=… "
            f"of {known} if one is there all the same"
        )
    return done.stdout.strip()


def target_name(product: str) -> str:
    """The target (conf/target) of a GPU's product name, e.g. `NVIDIA H200` -> h200."""
    known = [t for t in group_choices("target") if t not in ("auto", "cpu")]
    for target in known:
        if target in product.lower():
            return target
    raise BenchUsage(f"no target for {product}; give hardware=… of {', '.join(known)}")


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
        WORKER,
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
        out, errors = process.communicate()
        errors = f"over {limit:.0f} s"
    record["seconds"] = round(time.monotonic() - began, 2)
    # What it had found by then counts, whatever came after.
    found = [text for text in out.splitlines() if text.startswith("{") and text.endswith("}")]
    figures = {"figures": json.loads(found[-1])} if found else {}
    if process.returncode:
        return record | {"status": "failed", "error": errors.strip()[-ERROR:], **figures}
    return record | {"status": "done", **figures}


def line(record: dict[str, Any]) -> str:
    """One section in the table: its figures, or why there are none."""
    head = f"{record['section']:<10}{record['model']:<16}{record['status']:<8}"
    if record["status"] != "done":
        head += record["error"].splitlines()[-1] if record["error"] else ""
        return f"{head}; so far {summary(record['figures'])}" if record.get("figures") else head
    return f"{head}{record['seconds']:>6.1f} s  {summary(record.get('figures', {}))}"


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
