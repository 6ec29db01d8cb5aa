"""Every CUDA kernel on every sample of its op, on the device, against the op's reference.

The samples and the comparison are those of the interpreter tests; only what runs the launches
differs. Out: how many were wrong, and every failure.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import kernels.cuda.register
import kernels.ops.register  # noqa: F401
from bench.errors import BenchUsage
from compiler.bind import Built, bind
from compiler.worker_process import Questions, WorkerLost, WorkerProcess
from conf.bench_schema import GpuConfig
from kernels.cuda.build import build_cuda, build_each
from kernels.cuda.kernel import CudaKernel
from kernels.kernel import KERNELS
from kernels.launch import COUNTERS, COUNTERS_BYTES, WORKSPACE, Descriptor, Pointer, Source
from kernels.op import OPS
from kernels.toolchain import ToolchainError
from runtime.device.launcher import Launcher
from runtime.errors import HeadstartError

HARNESS = Path(__file__).resolve().parents[2] / "tests" / "cuda"
sys.path.insert(0, str(HARNESS))
POOL = 256 << 20  # bytes of device memory for one case
ALIGN = 256
SHOWN = 20  # failures told while it runs
HANG_S = 20.0  # of one case, its reference on the CPU included
GIVEN_UP = 3  # hangs and faults of a kernel before the rest of its cases is left out


def cases(only: Sequence[str] = ()) -> list[tuple[CudaKernel, str, Any, Any]]:
    """Every kernel (or `only` these) on every sample of its op: kernel, label, case, the default
    configuration."""
    known = {kernel.name: kernel for kernel in KERNELS["cuda"]}
    for name in only:
        if name not in known:
            raise BenchUsage(f"kernels: no {name!r}; choices: {', '.join(sorted(known))}")
    harness = importlib.import_module("cuda_harness")
    todo = []
    for kernel in (known[name] for name in only or known):
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
    """The figures so far before every case; `failed`, how many were wrong, at the end. The cases
    run in a process of their own: one that hangs or faults is a failure, the next one goes on."""
    todo, cache = cases(config.kernels), Path(config.cache).expanduser()
    built, unbuilt = build_each(_sources(todo), cache)
    failures: list[str] = []
    figures = {
        "kernels": len({kernel.name for kernel, *_ in todo}),
        "cases": len(todo),
        "cubins": len(built),
    }
    lost: Counter[str] = Counter()
    first = {"cache": str(cache), "kernels": config.kernels}
    with WorkerProcess([sys.executable, "-m", "bench.gpu.contracts"], first) as process:
        for number, case in enumerate(todo):
            kernel, label, *_ = case
            name = f"{kernel.name} on {label}"
            yield {**figures, "ran": number, "running": name, "failures": failures[-SHOWN:]}
            errors = [str(unbuilt[source]) for source in _sources([case]) if source in unbuilt]
            if lost[kernel.name] >= GIVEN_UP:
                errors.append(f"not tried: {GIVEN_UP} cases of this kernel hung or faulted")
            try:
                error = errors[0] if errors else process.ask({"case": number}, HANG_S)["error"]
            except WorkerLost as reason:
                lost[kernel.name] += 1
                error = str(reason)
            if error:
                failures.append(f"{name}: {error}"[:400])
    yield {**figures, "ran": len(todo), "failed": len(failures), "failures": failures}


def main() -> None:
    """The process that runs cases: {"case": number of it} -> {"error": what is wrong or ""}."""
    questions = Questions()
    cache, todo = Path(questions.first["cache"]), cases(questions.first["kernels"])
    harness = importlib.import_module("cuda_harness")
    with Launcher() as launcher:
        pool = launcher.allocate(POOL)
        questions.tell({"cases": len(todo)})
        for question in questions:
            kernel, _, case, choice = todo[question["case"]]
            error = ""
            try:
                built = build_cuda(_sources([todo[question["case"]]]), cache)
                run_on_device(launcher, pool, built, kernel, case, choice)
                harness.check_case(case)
            except (AssertionError, ToolchainError, HeadstartError) as found:
                error = str(found).strip() or type(found).__name__
                launcher.fill(pool, 1)  # after a fault no call works: that ends the process
            questions.tell({"error": error})


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


if __name__ == "__main__":
    main()
