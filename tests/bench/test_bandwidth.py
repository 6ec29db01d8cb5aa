"""The bandwidth tool reads its buffer and reports consistent rates (no timing is asserted)."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import bandwidth
from bench.bandwidth import Bandwidth, Rate
from bench.errors import BenchError


def test_reads(tmp_path: Path) -> None:
    buffer = Bandwidth(3 << 20, threads=2, cache=tmp_path)
    first = buffer.read(passes=2)
    second = buffer.read(passes=2)
    assert 0 < first.median <= first.best
    assert second.best >= first.best  # all passes so far count
    buffer.close()
    buffer.close()
    assert [p.suffix for p in tmp_path.iterdir()] == [".so"]


def test_bound() -> None:
    assert Rate(best=2e9, median=1e9).bound(1e9) == pytest.approx(0.5)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BenchError, match="cannot build"):
        Bandwidth(1 << 20, 1, cache=tmp_path)
    assert not list(tmp_path.glob("*.so"))
    assert bandwidth.SOURCE.exists()
