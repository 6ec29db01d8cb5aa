"""The sections of `bench.gpu`, in order: what each is called, may take, and runs.

Comes in: a config and, for sections of a model, its name and artifact. Goes out: figures, or an
iterator of the figures so far. Each runs in a process of its own (worker.py), because a fault on
the device takes the whole process with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from conf.bench_schema import GpuConfig

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
    of_model("compile", 150, "model.compiled", "model", needs=False, others=True),
    of_model("decode", 90, "model.decode", "model", "artifact", others=True),
    of_model("prefill", 60, "model.prefill", "artifact"),
    of_model("restore", 40, "model.restore", "artifact"),
    of_model("calls", 90, "calls.calls", "model", needs=False),
    of_model("peers", 150, "peers.peers", "model", needs=False, late=True),
    of_model("startup", 60, "model.startup", "artifact", late=True),
    of_model("serving", 90, "model.serving", "artifact", late=True),
    of_model("nodes", 45, "nodes.nodes", "artifact", late=True),
)


def jobs(config: GpuConfig) -> list[tuple[Section, str]]:
    """Sections and models in the order of their worth: correctness, the first model, what the
    others are compared by, and then the rest about the first."""
    wanted = [s for s in SECTIONS if not config.sections or s.name in config.sections]
    first, others = config.models[:1], config.models[1:]
    return [
        *((s, "") for s in wanted if not s.per_model),
        *((s, m) for m in first for s in wanted if s.per_model and not s.late),
        *((s, m) for m in others for s in wanted if s.per_model and s.others),
        *((s, m) for m in first for s in wanted if s.per_model and s.late),
    ]
