"""The bandwidth tool reads its buffer and reports consistent rates (no timing is asserted)."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import bandwidth
from bench.bandwidth import Bandwidth, Rate, share_of_bound
from bench.errors import BenchError


def test_reads(tmp_path: Path) -> None:
    buffer = Bandwidth(3 << 20, threads=2, cache=tmp_path)
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
        Bandwidth(1 << 20, 1, cache=tmp_path)
    assert not list(tmp_path.glob("*.so"))
    assert bandwidth.SOURCE.exists()
