"""Questions about the driver and the machine that no document answers, answered by trying.

Each probe is a function of the launcher that returns figures; one that fails says so and the others
go on. Out: figures by probe; answers.py puts them into words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.device_bandwidth import DeviceBandwidth
from bench.errors import BenchError
from bench.gpu.dlpack import DlPack
from compiler.bind import bind, build
from compiler.worker_process import Questions, WorkerLost, WorkerProcess
from conf.bench_schema import GpuConfig
from kernels.cuda import nvcc
from kernels.cuda.build import ARCH, ENVIRONMENT, decode_binary, ptxas
from kernels.cuda.kernel import launch
from kernels.launch import Binary, Descriptor, Launch, Pointer, Source
from kernels.toolchain import ToolchainError
from runtime.device.driver import DriverError
from runtime.device.gpu_code import Function
from runtime.device.gpu_memory import WISHED, GpuArena, Pinned
from runtime.device.launcher import Call, Launcher

HANG_S = 30.0  # of one probe
COUNT = 1024  # int32 that the counting kernel adds to
NEWER = "ptxas-blackwell"  # in Triton's wheel, for other architectures
Probe = Callable[[Launcher, GpuConfig], dict[str, Any]]


def probes(config: GpuConfig) -> Iterator[dict[str, Any]]:
    """The figures so far, after each probe; `failed`, how many, after the last. They run in a
    process of their own, since one may hang or fault."""
    found: dict[str, Any] = {}
    first = {"config": asdict(config)}
    with WorkerProcess([sys.executable, "-m", "bench.gpu.probes"], first) as process:
        for name in PROBES:
            try:
                found[name] = process.ask({"probe": name}, HANG_S)
            except WorkerLost as lost:
                found[name] = {"error": str(lost)}
            failed = sum("error" in figures for figures in found.values())
            yield {**found, **({"failed": failed} if len(found) == len(PROBES) else {})}


def main() -> None:
    """The process that tries them: {"probe": name} -> its figures, or {"error"}."""
    questions = Questions()
    config = GpuConfig(**questions.first["config"])
    questions.tell({})
    for question in questions:
        try:
            with Launcher() as launcher:
                figures = PROBES[question["probe"]](launcher, config)
        except DriverError:  # a fault perhaps, after which no call works: that ends the process
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, the next one is tried
            figures = {"error": f"{type(error).__name__}: {error}"[:500]}
        questions.tell(figures)


def counting(ctas: int = 1) -> Launch:
    return launch(
        "probe.count_kernel",
        (1, 1, 1),
        warps=4,
        ctas=ctas,
        x_ptr=Pointer(arg="x", type="i32"),
        BLOCK=COUNT,
    )


def launches() -> list[Launch]:
    """What the probes run, but for the bandwidth's."""
    return [counting(), counting(ctas=2), tile()[0]]


def read_bandwidth(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    size = min(4 << 30, launcher.free_memory() // 2)
    bandwidth = DeviceBandwidth(launcher, launcher.allocate(size), size, config.cache)
    rate = bandwidth.read(10)
    bandwidth.close()
    return {"bytes": size, "best_gb_s": rate.best / 1e9, "median_gb_s": rate.median / 1e9}


def cubin_abi(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    """Cubins load and give right results: those of the assembler in use, and of a newer one."""
    one = counting()
    built = build([one], config.cache)
    assert one.source is not None
    assembler = newest_assembler()
    ours, newer = built[one.source], assembled_by(one.source, assembler)
    out: dict[str, Any] = {"driver": launcher.gpu.driver, "newer_by": str(assembler)}
    for name, made in (("ours", ours), ("newer", newer)):
        base = launcher.allocate(4 * COUNT)
        launcher.fill(base, 4 * COUNT)
        graph = launcher.graph([bind(launcher, one, {one.source: made}, lambda slot, b=base: b)])  # type: ignore[misc]
        launcher.run(graph)
        graph.close()
        values = launcher.read(base, 4 * COUNT).view(np.int32)
        out[name] = {"elf_abi": made[0].elf_abi, "right": bool((values == 1).all())}
    return out


def newest_assembler() -> Path:
    """Of a CUDA 13 toolkit, whose cubins have a newer format; without one the newer of Triton's
    two."""
    try:
        return nvcc.root() / "bin" / "ptxas"
    except ToolchainError:
        return ptxas().with_name(NEWER)


def assembled_by(source: Source, assembler: Path) -> tuple[Binary, bytes]:
    """The source through another assembler, in a process of its own."""
    code = (
        "import json, sys\n"
        "from dataclasses import asdict\n"
        "from kernels.cuda.triton_compile import compile_source\n"
        "from kernels.launch import Source\n"
        "given = json.load(sys.stdin)\n"
        "pairs = {k: tuple(map(tuple, given.pop(k))) for k in ('signature', 'constants')}\n"
        f"binary, image = compile_source(Source(**given, **pairs), {ARCH!r})\n"
        "print(json.dumps([asdict(binary), image.hex()]))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        chosen = {"TRITON_PTXAS_PATH": str(assembler), "TRITON_CACHE_DIR": folder}
        outside = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(asdict(source)),
            env=outside | ENVIRONMENT | chosen,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise BenchError(f"{assembler.name}: {done.stderr.strip()[-300:]}")
    header, image = json.loads(done.stdout.splitlines()[-1])
    return decode_binary(header), bytes.fromhex(image)


def tile() -> tuple[Launch, int, int]:
    """Copies a matrix of so many rows and columns through a tensor map."""
    rows, columns = 256, 64
    one = launch(
        "probe.tile_kernel",
        (rows // 64, 1, 1),
        x_desc=Descriptor(
            arg="x", type="bf16", shape=(rows, columns), strides=(columns, 1), block=(64, columns)
        ),
        out_ptr=Pointer(arg="out", type="bf16"),
        ROWS=64,
        COLUMNS=columns,
    )
    return one, rows, columns


def tensor_maps(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    """A kernel node with a tensor map and null scratch copies a matrix; where the map lies."""
    one, rows, columns = tile()
    built = build([one], config.cache)
    data = np.random.default_rng(0).integers(0, 1 << 15, (rows, columns), np.uint16)
    base = launcher.allocate(2 * data.nbytes)
    places = {"x": base, "out": base + data.nbytes}
    launcher.write(base, data)
    call = bind(launcher, one, built, lambda slot: places[slot.arg])
    graph = launcher.graph([call])
    launcher.run(graph)
    graph.close()
    copied = launcher.read(places["out"], data.nbytes).view(np.uint16).reshape(data.shape)
    return {
        "offset": call.function.binary.parameters[0].offset,
        "right": bool((copied == data).all()),
    }


def count_chain(
    launcher: Launcher, config: GpuConfig, *, length: int, programmatic: bool, ctas: int = 1
) -> int:
    """What a chain of `length` counting kernels makes of zero."""
    graph, base = chain(launcher, config, length, programmatic, ctas)
    launcher.run(graph)
    graph.close()
    values = launcher.read(base, 4 * COUNT).view(np.int32)
    return int(values[0]) if (values == values[0]).all() else -1


def chain(
    launcher: Launcher, config: GpuConfig, length: int, programmatic: bool, ctas: int = 1
) -> tuple[Any, int]:
    one = counting(ctas)
    built = build([one], config.cache)
    base = launcher.allocate(4 * COUNT)
    launcher.fill(base, 4 * COUNT)
    call = bind(launcher, one, built, lambda slot: base)
    link = Call(
        function=call.function, grid=call.grid, arguments=call.arguments, programmatic=programmatic
    )
    return launcher.graph([link] * length), base


def programmatic_edges(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    """Right results over programmatic edges, and what each edge costs."""
    length = 200
    out: dict[str, Any] = {"nodes": length}
    for name, programmatic in (("full", False), ("programmatic", True)):
        value = count_chain(launcher, config, length=length, programmatic=programmatic)
        out[f"{name}_right"] = value == length
        graph, _ = chain(launcher, config, length, programmatic)
        out[f"{name}_us_per_node"] = median(launcher.seconds(graph)) / length * 1e6
        graph.close()
    return out


def wished_addresses(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    """Whether arenas get the addresses they wish for, in a fresh process with and without torch."""
    code = (
        "{torch}\n"
        "from runtime.device.launcher import Launcher\n"
        "from runtime.device.gpu_memory import WISHED, GpuArena\n"
        "from contextlib import ExitStack\n"
        "with Launcher() as l, ExitStack() as s:\n"
        "    print(all(GpuArena(l.driver, l.gpu, 1 << 21, s, wish=w).address == w "
        "for w in WISHED.values()))\n"
    )
    out: dict[str, Any] = {"wished": [hex(w) for w in WISHED.values()]}
    with_torch = f"import torch\ntorch.zeros(1, device={config.torch_device!r})"
    for name, statement in (("alone", ""), ("with_torch", with_torch)):
        command = [sys.executable, "-c", code.format(torch=statement)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        out[name] = done.stdout.strip() == "True" if not done.returncode else done.stderr[-300:]
    return out


def graph_cost(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    """Microseconds a node: adding and instantiating, the first launch after an upload."""
    out: dict[str, Any] = {}
    for nodes in (1000, 5000):
        began = time.perf_counter()
        graph, _ = chain(launcher, config, nodes, programmatic=True)
        made = time.perf_counter()
        launcher.run(graph)
        first = time.perf_counter()
        launcher.run(graph)
        second = time.perf_counter()
        graph.close()
        out[f"{nodes}_make_us_per_node"] = (made - began) / nodes * 1e6
        out[f"{nodes}_first_launch_ms"] = (first - made) * 1e3
        out[f"{nodes}_next_launch_ms"] = (second - first) * 1e3
    return out


def node_updates(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    """Microseconds to set one node's parameters in an executable: the alternative to an executable
    per bucket."""
    driver, api = launcher.driver, launcher.driver.api
    one = counting()
    built = build([one], config.cache)
    base = launcher.allocate(4 * COUNT)
    call = bind(launcher, one, built, lambda slot: base)
    values = np.frombuffer(b"".join(a.ljust(8, b"\0") for a in call.arguments), np.uint64)
    pointers = values.ctypes.data + 8 * np.arange(len(values), dtype=np.uint64)
    params = api.CUDA_KERNEL_NODE_PARAMS()
    params.func = call.function.handle
    params.gridDimX = params.gridDimY = params.gridDimZ = 1
    params.blockDimX, params.blockDimY, params.blockDimZ = call.function.binary.block, 1, 1
    params.sharedMemBytes = call.function.binary.shared
    params.kernelParams = int(pointers.ctypes.data)
    rounds = 1000
    with ExitStack() as stack:
        graph = driver("cuGraphCreate", 0)
        stack.callback(driver, "cuGraphDestroy", graph)
        node = driver("cuGraphAddKernelNode", graph, None, 0, params)
        executable = driver("cuGraphInstantiate", graph, 0)
        stack.callback(driver, "cuGraphExecDestroy", executable)
        began = time.perf_counter()
        for _ in range(rounds):
            driver("cuGraphExecKernelNodeSetParams", executable, node, params)
        return {"us_per_node": (time.perf_counter() - began) / rounds * 1e6}


def clusters(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    """A kernel of two-block clusters, with the cluster attribute on its node and without."""
    out: dict[str, Any] = {}
    out["with_attribute_right"] = count_chain(
        launcher, config, length=3, programmatic=True, ctas=2
    ) in (3, 6)
    one = counting(ctas=2)
    built = build([one], config.cache)
    base = launcher.allocate(4 * COUNT)
    launcher.fill(base, 4 * COUNT)
    call = bind(launcher, one, built, lambda slot: base)
    binary = call.function.binary
    plain = Function(
        handle=call.function.handle,
        binary=type(binary)(
            **{f: getattr(binary, f) for f in binary.__struct_fields__} | {"cluster": 1}
        ),
    )
    bare = Call(function=plain, grid=call.grid, arguments=call.arguments)
    try:
        graph = launcher.graph([bare] * 3)
        launcher.run(graph)
        graph.close()
        out["without_attribute"] = launcher.read(base, 4).view(np.int32).tolist()
    except Exception as error:  # noqa: BLE001 - refusing it is an answer
        out["without_attribute"] = str(error)[:200]
    return out


def torch_views(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    """Whether torch can look at mapped memory without a copy, by the array interface and by
    DLPack."""
    import torch

    device = config.torch_device
    base = launcher.allocate(4 * COUNT)
    launcher.write(base, np.arange(COUNT, dtype=np.int32))
    out: dict[str, Any] = {"torch": torch.__version__, "device": device}
    views: dict[str, Callable[[], Any]] = {
        "array_interface": lambda: torch.as_tensor(array(base, device), device=device),
        "dlpack": lambda: torch.from_dlpack(DlPack(base, device)),
    }
    for name, view in views.items():
        try:
            seen = view()
            right = seen.cpu().tolist() == list(range(COUNT))
            out[name] = {"aliases": seen.data_ptr() == base, "right": right}
            del seen
        except Exception as error:  # noqa: BLE001 - refusing it is an answer
            out[name] = {"refused": f"{type(error).__name__}: {error}"[:300]}
    return out


def array(address: int, device: str) -> Any:
    """Something with the array interface of the device."""

    class Array:
        described = {"shape": (COUNT,), "typestr": "<i4", "data": (address, False), "version": 3}
        if device == "cuda":
            __cuda_array_interface__ = described
        else:
            __array_interface__ = described

    return Array() if device == "cuda" else np.asarray(Array())


def bindings(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    return {"cuda_bindings": metadata.version("cuda-bindings")}


def memory_calls(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    """Milliseconds to map memory and to lock it, and the rate of copies from locked memory."""
    size, locked = min(16 << 30, launcher.free_memory() // 2), 256 << 20
    driver = launcher.driver
    with ExitStack() as stack:
        began = time.perf_counter()
        arena = GpuArena(driver, launcher.gpu, size, stack)
        mapped = time.perf_counter()
        pinned = Pinned(driver, locked, stack)
        pinned_at = time.perf_counter()
        copies = []
        for _ in range(5):
            start = time.perf_counter()
            driver("cuMemcpyHtoD", arena.address, pinned.address, locked)
            copies.append(time.perf_counter() - start)
    return {
        "map_gib": size / 2**30,
        "map_ms": (mapped - began) * 1e3,
        "lock_256_mib_ms": (pinned_at - mapped) * 1e3,
        "copy_gb_s": locked / median(copies) / 1e9,
    }


def crc_rate(launcher: Launcher, config: GpuConfig) -> dict[str, Any]:
    """How fast one core checks weights."""
    from runtime.device import crc32c

    data = np.zeros(64 << 20, np.uint8)
    began = time.perf_counter()
    crc32c.extend()(0, data.ctypes.data, data.nbytes)
    return {"gb_s": data.nbytes / (time.perf_counter() - began) / 1e9}


PROBES: dict[str, Probe] = {
    "read_bandwidth": read_bandwidth,
    "cubin_abi": cubin_abi,
    "tensor_maps": tensor_maps,
    "programmatic_edges": programmatic_edges,
    "wished_addresses": wished_addresses,
    "graph_cost": graph_cost,
    "node_updates": node_updates,
    "torch_views": torch_views,
    "bindings": bindings,
    "memory_calls": memory_calls,
    "crc_rate": crc_rate,
    "clusters": clusters,  # last: tries what may end in a fault
}


if __name__ == "__main__":
    main()
