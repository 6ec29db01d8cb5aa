"""Single kernels through the runtime's launcher, on the stub driver with real cubins."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cuda_stub import Stub, load

from bench.gpu import contracts, probes
from compiler.bind import bind, build
from conf.bench_schema import GpuConfig
from kernels.cuda.build import build_cuda
from kernels.kernel import KERNELS
from kernels.toolchain import ToolchainError
from runtime.device.driver import DriverError
from runtime.device.launcher import Call, Launcher

pytest.importorskip("triton")


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = load()
    stub.set("cubins", 1)
    yield stub
    assert stub.live() == 0, "objects of the driver were left behind"


def count(entry: bytes, params: object, grid: object) -> None:
    """The counting kernel, and the copy of a tile (whole matrix, by its first program)."""
    if entry == b"count_kernel":
        address = ctypes.cast(params[0], ctypes.POINTER(ctypes.c_uint64))[0]  # type: ignore[index]
        data = np.ctypeslib.as_array((ctypes.c_int32 * probes.COUNT).from_address(address))
        data += 1


def test_a_chain_runs_in_order_with_programmatic_edges(stub: Stub) -> None:
    stub.hook(count)
    config = GpuConfig()
    with Launcher() as launcher:
        assert probes.count_chain(launcher, config, length=5, programmatic=True) == 5
        edges = [call[8] for call in stub.named("cuGraphAddNode")]
        assert edges == ["none", *["1:1:0"] * 4]
        assert probes.count_chain(launcher, config, length=2, programmatic=False) == 2
        assert stub.named("cuGraphAddNode")[-1][8] == "0:0:0"
        graph, _ = probes.chain(launcher, config, 3, True)
        seconds = launcher.seconds(graph, rounds=4)
        assert len(seconds) == 4 and min(seconds) >= 0
        graph.close()


def test_clusters_and_tensor_maps_reach_the_driver(stub: Stub) -> None:
    config = GpuConfig()
    with Launcher() as launcher:
        probes.count_chain(launcher, config, length=1, programmatic=True, ctas=2)
        assert stub.named("cuGraphAddNode")[-1][1:4] == ["2", "1", "1"]
        assert stub.named("cuGraphKernelNodeSetAttribute")[-1][2:] == ["2", "1", "1"]
        answer = probes.tensor_maps(launcher, config)
        assert answer["offset"] == 48, "ptxas aligns the map within the constant bank"
        (map,) = stub.named("cuTensorMapEncodeTiled")
        assert map[3] == "64,256" and map[4] == "128"
        values = stub.named("cuGraphAddNode")[-1][9].split(",")
        assert len(values[0]) == 256 and [int(v, 16) for v in values[-2:]] == [0, 0]


def test_arguments_of_another_size_are_refused(stub: Stub) -> None:
    one = probes.counting()
    built = build([one], GpuConfig().cache)
    with Launcher() as launcher:
        call = bind(launcher, one, built, lambda slot: 0)
        wrong = Call(function=call.function, grid=(1, 1, 1), arguments=(b"\0" * 4,))
        with pytest.raises(ValueError, match="takes parameters of"):
            launcher.graph([wrong])


def test_memory_goes_there_and_back(stub: Stub) -> None:
    with Launcher() as launcher:
        base = launcher.allocate(100)
        launcher.write(base, np.arange(10, dtype=np.float32))
        assert launcher.read(base, 40).view(np.float32).tolist() == list(range(10))
        launcher.fill(base, 40)
        assert not launcher.read(base, 40).any()


@pytest.mark.slow
def test_every_probe_answers(stub: Stub) -> None:
    """Host code of every probe; the stub cannot give torch a view of its memory."""
    stub.hook(count)
    stub.set("free", 1 << 30)
    *_, answers = probes.probes(GpuConfig())
    failed = {name for name, answer in answers.items() if name != "failed" and "error" in answer}
    assert failed <= {"torch_views", "wished_addresses"}, {n: answers[n] for n in failed}


def test_contracts_run_every_case_and_report_what_is_wrong(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels do nothing on the stub: every case with a live row must fail, as a comparison."""
    add = [kernel for kernel in KERNELS["cuda"] if kernel.name == "add"]
    monkeypatch.setitem(KERNELS, "cuda", add)
    *_, figures = contracts.contracts(GpuConfig())
    assert figures["cases"] > figures["failed"] > 0 and figures["kernels"] == 1
    assert all(f.startswith("add on ") for f in figures["failures"])
    assert any("out" in f or "Tensor-likes" in f for f in figures["failures"])


def test_contracts_name_what_cannot_be_built_what_is_refused_and_what_faults(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One refused launch stops nothing; a fault ends it with the figures that there are."""
    add = next(kernel for kernel in KERNELS["cuda"] if kernel.name == "add")
    monkeypatch.setitem(KERNELS, "cuda", [add])
    todo = contracts.cases()[:4]
    gone = contracts._sources(todo[:1])[0]
    built = build_cuda(contracts._sources(todo), Path(GpuConfig().cache).expanduser())
    monkeypatch.setattr(contracts, "cases", lambda: todo)

    def each(sources: object, cache: object) -> object:
        return built, {gone: ToolchainError("no compiler")}

    monkeypatch.setattr(contracts, "build_each", each)
    run = iter([None, DriverError("refused"), DriverError("fault")])

    def fake(launcher: object, *rest: object) -> None:
        if error := next(run):
            monkeypatch.setattr(contracts, "_alive", lambda *x: "fault" not in str(error))
            raise error

    monkeypatch.setattr(contracts, "run_on_device", fake)
    first, *_, last = contracts.contracts(GpuConfig())
    assert first["running"].startswith("add on ") and "failed" not in first
    assert last["failed"] >= 3 and last["ran"] <= last["cases"] == 4
    assert any("no compiler" in f for f in last["failures"])
    assert "fault" in last["failures"][-1]
