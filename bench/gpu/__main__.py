"""All that needs a GPU, in one bounded run without a network: `python -m bench.gpu` (`make gpu`).

Correctness first (every kernel on the device, tokens beside the CPU's), then answers about the
driver, then the measurements of each model. A section that fails or takes too long is recorded and
the next one runs. Out: the table of goals, and one JSON document, written anew after every section,
that also names what was not measured. With `resume` a later command goes on with that document.
"""

from __future__ import annotations

import json
import os
import shutil
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
from bench.gpu.sections import AGAIN, COMPILE, SECTIONS, TUNE, Job, jobs, limit
from compiler import tuned
from conf.bench_schema import GpuConfig
from conf.load import run
from conf.options import group_choices
from runtime.device.machine import gpu_names

RESULTS = Path("bench/results")
WORKER = [sys.executable, "-m", "bench.gpu.worker"]
ERROR = 600  # characters of an error that are kept
KILLED_S = 10.0  # for a process to be gone
STATE = "result.json"  # of a folder that a run is resumed from
ENDED = ("done", "failed")  # what is not tried again; what the time cut short is
# Options that change nothing without a section (`serving` is also of the context compiled for).
ONLY_FOR = {
    "tune": TUNE,
    "tune_s": TUNE,
    "kernels": "contracts",
    "rates": "serving",
    "load_s": "serving",
}


def main(config: GpuConfig, sources: Mapping[str, str]) -> int:
    deadline = time.monotonic() + config.seconds
    check(config, sources)
    config = replace(config, hardware=config.hardware or target_name(gpu_name(config.gpu)))
    run = Run(config, deadline)
    for job in run.todo():
        print(line(run.do(job)), flush=True)
    document = run.document | {
        "unmeasured": run.unmeasured,
        "goals": goals.reached(run.document),
        "answers": answers.answers(run.document),
    }
    paths = run.write(document)
    print(goals.table(document["goals"]))
    print(answers.table(document["answers"]))
    if run.unmeasured:
        print(f"not measured: {', '.join(run.unmeasured)}")
    print(paths[-1])
    return 1 if run.unmeasured else 0


def check(config: GpuConfig, sources: Mapping[str, str]) -> None:
    """Refuse what cannot be, and what was asked for but changes nothing."""
    names = [s.name for s in SECTIONS]
    for name in config.sections:
        if name not in names:
            raise BenchUsage(f"sections: no {name!r}; choices: {', '.join(names)}")
    for model in config.artifacts:
        if model not in config.models:
            raise BenchUsage(f"artifacts.{model}: it is none of models={config.models}")
    if config.resume and config.records:
        raise BenchUsage(
            f"records={config.records} with resume={config.resume}: records are kept there; leave "
            "one of them out"
        )
    for option, section in ONLY_FOR.items():
        if sources.get(option) == "override" and section not in (config.sections or names):
            raise BenchUsage(
                f"{option}={getattr(config, option)}: is for the section {section}, "
                f"sections={config.sections} has none; leave it out"
            )
    if sources.get("tune_s") == "override" and not config.tune:
        raise BenchUsage(f"tune_s={config.tune_s:g}: tune=false tunes nothing; leave it out")
    if TUNE in config.sections and not config.tune:
        raise BenchUsage(
            f"tune=false: sections={config.sections} asks for {TUNE}; leave one of them out"
        )


class Run:
    """The jobs of a config, what was found, and where it is kept."""

    def __init__(self, config: GpuConfig, deadline: float) -> None:
        self.deadline, self.target = deadline, str(config.hardware)
        self.records: list[dict[str, Any]] = []
        self.paths: list[Path] = []
        if config.resume:
            folder = Path(config.resume).expanduser()
            self.paths.append(folder / STATE)
            self.records = kept(folder / STATE, self.target)
            given = tuned.FOLDER / f"{self.target}.json"
            if given.exists() and not (folder / given.name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(given, folder / given.name)
            config = replace(config, records=str(folder))
        if config.output_file or not config.resume:
            path = Path(config.output_file or result_path(self.target)).expanduser()
            self.paths.append(path)
        if config.records:
            Path(config.records).expanduser().mkdir(parents=True, exist_ok=True)
        self.config = config
        self.jobs = jobs(config)
        stamp = {"hardware": self.target, "sections": self.records}
        self.document = results.stamp("gpu", stamp)
        self.artifacts = {(model, False): path for model, path in config.artifacts.items()}
        self.hung: set[str] = set()  # artifacts
        for record in self.records:
            self.note(record)

    def todo(self) -> list[Job]:
        """What did not end before, and compiles whose artifacts are gone but wanted."""
        ended = {key(r) for r in self.records if r["status"] in ENDED}
        left = [job for job in self.jobs if key_of(job) not in ended]
        wanted = {(job.model, job.tuned) for job in left if job.section.needs and job.model}
        gone = {k for k in wanted if k in self.artifacts and not Path(self.artifacts[k]).is_dir()}
        return [
            job
            for job in self.jobs
            if job in left or (job.section.name == COMPILE and (job.model, job.tuned) in gone)
        ]

    def do(self, job: Job) -> dict[str, Any]:
        record = self.skipped(job) or run_section(
            job, self.config, self.deadline, self.artifacts.get((job.model, job.tuned), "")
        )
        # Of a section that ran before, the figures stay until there are others.
        old = next((r for r in self.records if key(r) == key_of(job)), None)
        if old is not None and ("figures" in record or "figures" not in old):
            self.records.remove(old)
            old = None
        if old is None:
            self.records.append(record)
        self.note(record)
        self.write(self.document)
        return record

    def skipped(self, job: Job) -> dict[str, Any] | None:
        """A record of why it is not worth a try."""
        artifact = self.artifacts.get((job.model, job.tuned), "")
        why = ""
        if time.monotonic() > self.deadline - 1:
            why = f"the {self.config.seconds:g} s are used up"
        elif job.tuned and job.section.name in AGAIN and self.unchanged(job.model):
            why = "tuning found nothing, so it is as before"
        elif job.section.needs and job.model and not artifact:
            why = "no artifact"
        elif job.section.needs and artifact in self.hung:
            why = "a section with this artifact did not end"
        return {**blank(job), "status": "skipped", "error": why} if why else None

    def unchanged(self, model: str) -> bool:
        """Whether a compile after the tuning would make the artifact that there is."""
        mine = (r for r in self.records if (r["section"], r["model"]) == (TUNE, model))
        found = any(r.get("figures", {}).get("records") for r in mine)
        place = model, True
        return not found and place in self.artifacts and Path(self.artifacts[place]).is_dir()

    def note(self, record: Mapping[str, Any]) -> None:
        place = record["model"], record.get("tuned", False)
        found = record.get("figures", {}).get("artifact")
        if found:
            self.artifacts[place] = found
            self.artifacts.setdefault((record["model"], True), found)  # until it has its own
        over = record["status"] == "failed" and record["error"].startswith("over ")
        if over and "figures" not in record and place in self.artifacts:
            self.hung.add(self.artifacts[place])

    @property
    def unmeasured(self) -> list[str]:
        done = {key(r) for r in self.records if r["status"] == "done"}
        return [job.name for job in self.jobs if key_of(job) not in done]

    def write(self, document: Mapping[str, Any]) -> list[Path]:
        """The files are whole at every moment."""
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        if len(self.paths) > 1:
            choices, beside = (path.parent / f"{self.target}.json" for path in self.paths)
            if choices.exists() and choices.resolve() != beside.resolve():
                shutil.copyfile(choices, beside)
        return self.paths


def blank(job: Job) -> dict[str, Any]:
    return {"section": job.section.name, "model": job.model, "tuned": job.tuned}


def key_of(job: Job) -> tuple[str, str, bool]:
    return job.section.name, job.model, job.tuned


def key(record: Mapping[str, Any]) -> tuple[str, str, bool]:
    return record["section"], record["model"], record.get("tuned", False)


def kept(path: Path, target: str) -> list[dict[str, Any]]:
    """What an earlier command of the same run found."""
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text("utf-8"))
        records: list[dict[str, Any]] = list(document["sections"])
        for record in records:
            key(record), record["status"]
        hardware = document["hardware"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchUsage(f"{path} is no result of bench.gpu ({error!r}); delete it") from None
    if hardware != target:
        raise BenchUsage(f"{path} is of {hardware}, this run of {target}; delete it")
    return records


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


def run_section(job: Job, config: GpuConfig, deadline: float, artifact: str) -> dict[str, Any]:
    """`status`: done; failed; or cut, by the end of the whole. `figures`: what was found."""
    record = blank(job)
    most, left = limit(job, config), deadline - time.monotonic()
    seconds = min(most, left)
    question = {
        "section": job.section.name,
        "config": asdict(replace(config, seconds=seconds)),
        "model": job.model,
        "artifact": artifact,
    }
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
    late = False
    try:
        out, errors = process.communicate(json.dumps(question), timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        try:
            out, _ = process.communicate(timeout=KILLED_S)
        except subprocess.TimeoutExpired as stuck:  # in the driver
            out = (stuck.output or b"").decode(errors="replace")
        late, errors = True, f"over {seconds:.0f} s"
    record["seconds"] = round(time.monotonic() - began, 2)
    # What it had found by then counts, whatever came after.
    found = [text for text in out.splitlines() if text.startswith("{") and text.endswith("}")]
    figures = {"figures": json.loads(found[-1])} if found else {}
    if process.returncode != 0:
        status = "cut" if late and seconds < most else "failed"
        return record | {"status": status, "error": errors.strip()[-ERROR:], **figures}
    return record | {"status": "done", **figures}


def line(record: dict[str, Any]) -> str:
    """One section in the table: its figures, or why there are none."""
    model = f"{record['model']}{' tuned' if record['tuned'] else ''}"
    head = f"{record['section']:<10}{model:<21}{record['status']:<8}"
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
