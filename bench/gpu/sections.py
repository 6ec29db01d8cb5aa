"""The sections of `bench.gpu`, in order: what each is called, may take, and runs.

Comes in: a config and, for sections of a model, its name and artifact. Goes out: figures, or an
iterator of the figures so far. Each runs in a process of its own (worker.py), because a fault on
the device takes the whole process with it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from conf.bench_schema import GpuConfig

COMPILE, TUNE = "compile", "tune"
AGAIN = (COMPILE, "decode", "prefill")  # what tells a tuned model from itself
Figures = dict[str, Any]
Run = Callable[[GpuConfig, str, str], Figures | Iterator[Figures]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """`seconds`: the most it may take; `run(config, model, artifact)`, both empty unless
    `per_model`. `needs`: it wants the model's artifact. `others`: of models but the first, too;
    `late`: after those others."""

    name: str
    seconds: float
    run: Run
    per_model: bool = False
    needs: bool = True
    others: bool = False
    late: bool = False


def machine(config: GpuConfig, model: str, artifact: str) -> Figures:
    from runtime.device.launcher import Launcher

    names = ("torch", "triton", "cuda-bindings", "numpy")
    with Launcher() as launcher:
        gpu = launcher.gpu
        return {
            "gpu": gpu.name,
            "capability": ".".join(map(str, gpu.capability)),
            "driver": gpu.driver,
            "multiprocessors": gpu.multiprocessors,
            "l2_bytes": gpu.l2,
            "free_bytes": launcher.free_memory(),
            "versions": {name: _version(name) for name in names} | _tools(),
            "prebuilt": _prebuilt(config),
        }


def _tools() -> dict[str, str]:
    """Versions of what builds kernels: those of a bundle are found where they are the same."""
    from kernels.cuda.build import versions
    from kernels.toolchain import ToolchainError

    found: dict[str, str] = {}
    for language, tool in (("triton", "ptxas"), ("cuda", "nvcc")):
        try:
            found[tool] = versions(language)[tool]
        except ToolchainError as error:
            found[tool] = str(error)
    return found


def _prebuilt(config: GpuConfig) -> str:
    """Whether kernels of the bundle are of the tools here: others are built anew, in minutes."""
    from bench.gpu.probes import counting
    from kernels.cuda.build import ARCH, key
    from kernels.toolchain import ToolchainError

    source = counting().source
    assert source is not None
    try:
        there = (Path(config.cache).expanduser() / "cuda" / key(source, ARCH)).exists()
    except ToolchainError as error:
        return str(error)
    return "yes" if there else "no: this machine's tools or sources are others; all are built here"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def later(function: str, *takes: str) -> Run:
    """A section that is `<module>.<name>` of bench.gpu, imported when it runs: `machine` must work
    where torch or triton are missing. `takes`: what it wants beyond the config."""

    def run(config: GpuConfig, model: str, artifact: str) -> Figures | Iterator[Figures]:
        module, _, name = function.partition(".")
        given = {"model": model, "artifact": artifact}
        found = getattr(importlib.import_module(f"bench.gpu.{module}"), name)
        figures: Figures | Iterator[Figures] = found(config, *(given[what] for what in takes))
        return figures

    return run


def of_model(name: str, seconds: float, function: str, *takes: str, **rest: bool) -> Section:
    run = later(function, *takes)
    return Section(name=name, seconds=seconds, run=run, per_model=True, **rest)


SECTIONS = (
    Section(name="machine", seconds=40, run=machine),
    Section(name="contracts", seconds=120, run=later("contracts.contracts")),
    Section(name="tokens", seconds=120, run=later("model.tokens_as_on_cpu")),
    Section(name="probes", seconds=60, run=later("probes.probes")),
    of_model(COMPILE, 150, "model.compiled", "model", needs=False, others=True),
    of_model("decode", 90, "model.decode", "model", "artifact", others=True),
    of_model("prefill", 60, "model.prefill", "artifact"),
    of_model(TUNE, math.inf, "model.tuned", "model", needs=False, others=True),
    of_model("calls", 90, "calls.calls", "model", needs=False),
    of_model("restore", 40, "model.restore", "artifact"),
    of_model("peers", 150, "peers.peers", "model", needs=False),
    of_model("startup", 60, "model.startup", "artifact", late=True),
    of_model("serving", 90, "model.serving", "artifact", late=True),
    of_model("nodes", 45, "nodes.nodes", "artifact", late=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`tuned`: after the model's tuning."""

    section: Section
    model: str = ""
    tuned: bool = False

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.section.name, self.model, "tuned" * self.tuned)))


def jobs(config: GpuConfig) -> list[Job]:
    """In the order of their worth: correctness; the first model, as it is and tuned; what the
    others are compared by; the rest about the first; the others tuned."""
    wanted = [s for s in SECTIONS if not config.sections or s.name in config.sections]
    of_models = [s for s in wanted if s.per_model]
    early = [s for s in of_models if not s.late]
    first, others = config.models[:1], config.models[1:]

    def plain(model: str, sections: list[Section]) -> list[Job]:
        """Of a model that is tuned what stands before the tuning, else all."""
        names = [s.name for s in sections]
        end = names.index(TUNE) if TUNE in names and is_tuned(model, config) else len(names)
        return [Job(section=s, model=model) for s in sections[:end] if s.name != TUNE]

    def tuned(model: str, sections: list[Section]) -> list[Job]:
        tune = [Job(section=s, model=model) for s in sections if s.name == TUNE]
        if not tune or not is_tuned(model, config):
            return []
        rest = [s for s in sections if s.name != TUNE]
        return [*tune, *(Job(section=s, model=model, tuned=True) for s in rest)]

    late = [s for s in of_models if s.late]
    after = TUNE in [s.name for s in early]
    compared = [s for s in early if s.others]
    return [
        *(Job(section=s) for s in wanted if not s.per_model),
        *(job for m in first for job in (*plain(m, early), *tuned(m, early))),
        *(job for m in others for job in plain(m, compared)),
        *(
            Job(section=s, model=m, tuned=after and is_tuned(m, config))
            for m in first
            for s in late
        ),
        *(job for m in others for job in tuned(m, compared)),
    ]


def is_tuned(model: str, config: GpuConfig) -> bool:
    return config.tune and model not in config.artifacts


def limit(job: Job, config: GpuConfig) -> float:
    """Seconds that it may take."""
    if job.section.name != TUNE:
        return job.section.seconds
    return config.tune_s if job.model == config.models[0] else config.tune_s / 3
