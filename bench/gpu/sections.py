"""The sections of `bench.gpu`, in order: what each is called, may take, and runs.

Comes in: a config and, for sections of a model, its name and artifact. Goes out: figures. Each runs
in a process of its own (worker.py), because a fault on the device takes the whole process with it.
"""

from __future__ import annotations

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


def probes(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.probes import probes as run

    return run(config)


def contracts(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.contracts import contracts as run

    return run(config)


def tokens(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.model import tokens_as_on_cpu

    return tokens_as_on_cpu(config)


def compiled(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.model import compiled as run

    return run(config, model)


def decode(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.model import decode as run

    return run(config, artifact)


def prefill(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.model import prefill as run

    return run(config, artifact)


def restore(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.model import restore as run

    return run(config, artifact)


def startup(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.model import startup as run

    return run(config, artifact)


def nodes(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.nodes import nodes as run

    return run(config, artifact)


def products(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.nodes import products as run

    return run(config, artifact)


def peers(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.peers import peers as run

    return run(config, model)


def serving(config: GpuConfig, model: str, artifact: str) -> Figures:
    from bench.gpu.model import serving as run

    return run(config, artifact)


SECTIONS = (
    Section(name="machine", seconds=30, run=machine),
    Section(name="probes", seconds=60, run=probes),
    Section(name="contracts", seconds=120, run=contracts),
    Section(name="tokens", seconds=90, run=tokens),
    Section(name="compile", seconds=150, run=compiled, per_model=True, needs=False),
    Section(name="restore", seconds=30, run=restore, per_model=True),
    Section(name="decode", seconds=60, run=decode, per_model=True),
    Section(name="prefill", seconds=60, run=prefill, per_model=True),
    Section(name="nodes", seconds=45, run=nodes, per_model=True),
    Section(name="products", seconds=30, run=products, per_model=True),
    Section(name="startup", seconds=60, run=startup, per_model=True),
    Section(name="peers", seconds=120, run=peers, per_model=True, needs=False),
    Section(name="serving", seconds=90, run=serving, per_model=True),
)
