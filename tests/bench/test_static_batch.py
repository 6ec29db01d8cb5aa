"""The static batch on the null device: what is timed and what is refused."""

from __future__ import annotations

import pytest

from bench.errors import BenchError
from bench.static_batch import StaticBatch, TooLarge
from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.device.base import Capacity
from runtime.device.null import NullSession

CAPACITY = Capacity(
    context=128,
    vocab=50,
    page_size=16,
    pages=64,
    max_seqs=4,
    max_tokens=32,
    slots=8,
    edits=256,
)


def static(step_s: float = 0.0, **options: object) -> StaticBatch:
    session = NullSession(CAPACITY, step_s=step_s)
    return StaticBatch(session, EngineLoop(session, EngineOptions(artifact="", **options), eos=()))  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [True, False])
def test_counts_full_steps(overlap: bool) -> None:
    batch = static(overlap=overlap, step_s=0.002)
    run = batch.run(batch.prompts(3, 40, seed=0), 10)
    assert len(run.decode) == 9
    # 120 prompt tokens in steps of 32 are four steps of 2 ms at least.
    assert run.prefill >= 0.0075
    assert sum(run.decode) >= 9 * 0.0015
    assert not batch.loop.has_work
    batch.loop.idle()  # the books balance


def test_runs_do_not_disturb_each_other() -> None:
    batch = static()
    for seed in range(3):
        assert len(batch.run(batch.prompts(4, 16, seed), 5).decode) == 4


def test_one_token_is_prefill_only() -> None:
    batch = static()
    assert batch.run(batch.prompts(1, 20, 0), 1).decode == []


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((5, 8, 8), "max batch size limit of 4"), ((1, 100, 60), "context limit of 128")],
)
def test_refuses_what_does_not_fit(shape: tuple[int, int, int], reason: str) -> None:
    batch = static()
    with pytest.raises(TooLarge, match=reason):
        batch.check(*shape)


def test_refused_requests_are_errors() -> None:
    batch = static()
    with pytest.raises(BenchError, match="ended early"):
        batch.run([[999] * 8], 4)
