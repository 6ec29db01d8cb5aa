"""The bandwidth tool reads its buffer and reports consistent rates (no timing is asserted)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import bandwidth
from bench.bandwidth import Bandwidth, Rate, share_of_bound
from bench.errors import BenchError
from kernels.cpu.run import Team
from kernels.toolchain import supported_levels


def test_reads(tmp_path: Path) -> None:
    with Team(supported_levels()[-1].name, 2) as team:
        buffer = Bandwidth(3 << 20, team.call, cache=tmp_path)
        first = buffer.read(passes=2)
        second = buffer.read(passes=2)
        assert 0 < first.median <= first.best
        assert 0 < second.median <= second.best
        assert buffer.rate.best == max(first.best, second.best)  # all passes so far count
        buffer.close()
        buffer.close()
    assert [p.suffix for p in tmp_path.iterdir()] == [".so"]


def test_share_follows_the_reads_next_to_the_step() -> None:
    fast, slow = Rate(best=9e9, median=8e9), Rate(best=5e9, median=4e9)
    assert share_of_bound(1e9, 0.25, fast, fast) == pytest.approx(0.5)
    assert share_of_bound(1e9, 0.5, slow, slow) == pytest.approx(0.5)
    assert share_of_bound(1e9, 0.375, fast, slow) == pytest.approx(0.5)  # half of it at each speed


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BenchError, match="cannot build"):
        Bandwidth(1 << 20, lambda function, argument: 1.0, cache=tmp_path)
    assert not list(tmp_path.glob("*.so"))
    assert bandwidth.SOURCE.exists()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_pass_reads_every_byte_once(tmp_path: Path, threads: int) -> None:
    """The xor of all words, whatever the threads; twice, it is gone."""
    with Team(supported_levels()[-1].name, threads) as team:
        buffer = Bandwidth(5 << 20, team.call, cache=tmp_path)
        words = np.arange(0, 5 << 20, 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        expected = np.bitwise_xor.reduce(words.view(np.int32))
        buffer.read(passes=1)
        assert buffer.kept == 0  # an even number of distances
        buffer.read_once(4096)
        assert buffer.kept == expected
        buffer.close()
