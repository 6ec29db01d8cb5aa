"""Single kernels through the runtime's launcher, on the stub driver with real cubins."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from cuda_stub import Stub, load

from bench.gpu import probes
from compiler.bind import bind, build
from conf.bench_schema import GpuConfig
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
