"""The sections of `bench.gpu`, in order: what each is called, may take, and runs.

Comes in: a config and, for sections of a model, its name and artifact. Goes out: figures. Each runs
in a process of its own (worker.py), because a fault on the device takes the whole process with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from conf.bench_schema import GpuConfig

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """`seconds`: the most it may take; `run(config, model, artifact)`, both empty unless
    `per_model`. `needs`: it wants the model's artifact (all but the one that makes it)."""

    name: str
    seconds: float
    run: Callable[[GpuConfig, str, str], Figures]
    per_model: bool = False
    needs: bool = True


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
            "versions": {name: _version(name) for name in names},
        }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def later(function: str, *takes: str) -> Callable[[GpuConfig, str, str], Figures]:
    """A section that is `<module>.<name>` of bench.gpu, imported when it runs: `machine` must work
    where torch or triton are missing. `takes`: what it wants beyond the config."""

    def run(config: GpuConfig, model: str, artifact: str) -> Figures:
        module, _, name = function.partition(".")
        given = {"model": model, "artifact": artifact}
        found = getattr(importlib.import_module(f"bench.gpu.{module}"), name)
        figures: Figures = found(config, *(given[what] for what in takes))
        return figures

    return run


SECTIONS = (
    Section(name="machine", seconds=30, run=machine),
    Section(name="probes", seconds=60, run=later("probes.probes")),
    Section(name="contracts", seconds=120, run=later("contracts.contracts")),
    Section(name="tokens", seconds=90, run=later("model.tokens_as_on_cpu")),
    Section(
        name="compile",
        seconds=150,
        run=later("model.compiled", "model"),
        per_model=True,
        needs=False,
    ),
    Section(name="restore", seconds=30, run=later("model.restore", "artifact"), per_model=True),
    Section(name="decode", seconds=60, run=later("model.decode", "artifact"), per_model=True),
    Section(name="prefill", seconds=60, run=later("model.prefill", "artifact"), per_model=True),
    Section(name="nodes", seconds=45, run=later("nodes.nodes", "artifact"), per_model=True),
    Section(name="products", seconds=30, run=later("nodes.products", "artifact"), per_model=True),
    Section(name="startup", seconds=60, run=later("model.startup", "artifact"), per_model=True),
    Section(
        name="peers", seconds=120, run=later("peers.peers", "model"), per_model=True, needs=False
    ),
    Section(name="serving", seconds=90, run=later("model.serving", "artifact"), per_model=True),
)
