"""What only a GPU can show: `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import pytest

from bench.gpu import probes
from bench.gpu.contracts import contracts
from conf.bench_schema import GpuConfig
from runtime.device.launcher import Launcher

pytestmark = pytest.mark.gpu


def test_every_kernel_keeps_its_contract_on_the_device() -> None:
    *_, figures = contracts(GpuConfig())
    assert figures["failures"] == []


@pytest.mark.parametrize("programmatic", [False, True])
def test_a_chain_of_kernels_counts_right(programmatic: bool) -> None:
    with Launcher() as launcher:
        count = probes.count_chain(launcher, GpuConfig(), length=500, programmatic=programmatic)
    assert count == 500


def test_tensor_maps_copy() -> None:
    with Launcher() as launcher:
        assert probes.tensor_maps(launcher, GpuConfig()) == {"offset": 48, "right": True}
