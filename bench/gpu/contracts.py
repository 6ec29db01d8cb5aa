"""Every CUDA kernel on every sample of its op, on the device, against the op's reference.

The samples and the comparison are those of the interpreter tests; only what runs the launches
differs. Out: how many were wrong, and every failure.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import kernels.cuda.register
import kernels.ops.register  # noqa: F401
from compiler.bind import Built, bind
from conf.bench_schema import GpuConfig
from kernels.cuda.build import build_each
from kernels.cuda.kernel import CudaKernel
from kernels.kernel import KERNELS
from kernels.launch import COUNTERS, COUNTERS_BYTES, WORKSPACE, Descriptor, Pointer, Source
from kernels.op import OPS
from kernels.toolchain import ToolchainError
from runtime.device.driver import DriverError
from runtime.device.launcher import Launcher
from runtime.errors import HeadstartError

HARNESS = Path(__file__).resolve().parents[2] / "tests" / "cuda"
sys.path.insert(0, str(HARNESS))
POOL = 256 << 20  # bytes of device memory for one case
ALIGN = 256
SHOWN = 20  # failures told while it runs


def cases() -> list[tuple[CudaKernel, str, Any, Any]]:
    """Every kernel on every sample of its op: kernel, label, case, the default configuration."""
    harness = importlib.import_module("cuda_harness")
    todo = []
    for kernel in KERNELS["cuda"]:
        for dtype in ("bfloat16", "float32"):
            for label, case in harness.cases(OPS[kernel.op], dtype):
                if kernel.accepts(case.call) is None:
                    todo.append((kernel, label, case, kernel.default(case.call)))
    return todo


def sources() -> list[Source]:
    return _sources(cases())


def _sources(todo: list[tuple[CudaKernel, str, Any, Any]]) -> list[Source]:
    launches = (x for k, _, case, c in todo for x in k.launches(case.call, c))
    return [launch.source for launch in launches if launch.source is not None]


def contracts(config: GpuConfig) -> Iterator[dict[str, Any]]:
    """The figures so far before every case, so that one that hangs has a name; `failed`, how many
    were wrong, at the end. A fault on the device ends it: this process has lost the device."""
    todo = cases()
    harness = importlib.import_module("cuda_harness")
    built, unbuilt = build_each(_sources(todo), Path(config.cache).expanduser())
    failures: list[str] = []
    figures = {
        "kernels": len({kernel.name for kernel, *_ in todo}),
        "cases": len(todo),
        "cubins": len(built),
    }
    ran = 0
    with Launcher() as launcher:
        pool = launcher.allocate(POOL)
        for kernel, label, case, choice in todo:
            name = f"{kernel.name} on {label}"
            yield {**figures, "ran": ran, "running": name, "failures": failures[-SHOWN:]}
            ran += 1
            try:
                for x in kernel.launches(case.call, choice):
                    if x.source in unbuilt:
                        raise unbuilt[x.source]
                run_on_device(launcher, pool, built, kernel, case, choice)
                harness.check_case(case)
            except (AssertionError, ToolchainError) as error:
                failures.append(f"{name}: {str(error).strip()[:300]}")
            except HeadstartError as error:
                failures.append(f"{name}: {error}"[:300])
                if not _alive(launcher, pool):
                    break
        yield {**figures, "ran": ran, "failed": len(failures), "failures": failures}


def _alive(launcher: Launcher, address: int) -> bool:
    """Whether the device still answers: after a fault no call does, after a refused launch all."""
    try:
        launcher.fill(address, 1)
    except DriverError:
        return False
    return True


def run_on_device(
    launcher: Launcher, pool: int, built: Built, kernel: Any, case: Any, choice: Any
) -> None:
    """The case's memory goes to the device, the launches run there, and it comes back."""
    import torch

    memory = dict(case.memory)
    size = max(kernel.workspace(case.call, choice), 1)
    memory[WORKSPACE] = torch.full((size,), 0xAB, dtype=torch.uint8)
    memory[COUNTERS] = torch.zeros(COUNTERS_BYTES // 4, dtype=torch.int32)
    places: dict[str, int] = {}
    end = 0
    for name, tensor in memory.items():
        places[name] = pool + end
        end += -(-max(tensor.nbytes, 1) // ALIGN) * ALIGN
    assert end <= POOL, f"the case takes {end} bytes, {POOL} are set aside"
    raw = {
        name: tensor.contiguous().reshape(-1).view(torch.uint8) for name, tensor in memory.items()
    }
    for name, data in raw.items():
        launcher.write(places[name], data.numpy())

    def address(slot: Pointer | Descriptor) -> int:
        return places[f"{slot.arg}.{slot.field}" if slot.field else slot.arg] + slot.offset

    calls = [bind(launcher, x, built, address) for x in kernel.launches(case.call, choice)]
    graph = launcher.graph(calls)
    try:
        launcher.run(graph)
    finally:
        graph.close()
    for name, tensor in memory.items():
        data = torch.from_numpy(launcher.read(places[name], tensor.nbytes))
        if tensor.nbytes:
            tensor.copy_(data.view(tensor.dtype).reshape(tensor.shape))
    assert not np.asarray(memory[COUNTERS]).any(), f"{kernel.name} leaves counters that are not 0"
