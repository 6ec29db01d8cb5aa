"""The static batch on the null device: what is timed and what is refused."""

from __future__ import annotations

import pytest

from bench import static_batch
from bench.bandwidth import Rate, share_of_bound
from bench.errors import BenchError
from bench.static_batch import WARM_STEPS, StaticBatch, TooLarge
from bench.windows import WINDOW, windows
from conf.bench_schema import LatencyConfig
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


def test_the_shortest_run_that_is_allowed_has_steps_that_count() -> None:
    shortest = LatencyConfig.__dataclass_fields__["output_len"].metadata["low"]
    batch = static()
    assert batch.run(batch.prompts(2, 16, 0), shortest, pause=lambda: None).decode
    assert not batch.run(batch.prompts(2, 16, 1), shortest - 1, pause=lambda: None).decode


class Memory:
    """A clock that steps and reads move on, at a speed that changes from window to window."""

    def __init__(self, batch: StaticBatch, slow_from: int) -> None:
        self.now, self.steps, self.pauses = 0.0, 0, []
        self.slow_from = slow_from
        step = batch.loop.step

        def timed() -> list:
            self.steps += 1
            self.now += 0.02 / self.speed  # half of what memory gives
            return step()

        batch.loop.step = timed  # type: ignore[method-assign]

    @property
    def speed(self) -> float:
        return 1.0 if self.steps >= self.slow_from else 2.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def pause(self) -> None:
        self.now += 5.0
        self.pauses.append(Rate(best=2e9, median=self.speed * 1e9))


@pytest.mark.parametrize("slow_from", [0, 1 + WARM_STEPS + WINDOW, 1000])
def test_pauses_between_windows(monkeypatch: pytest.MonkeyPatch, slow_from: int) -> None:
    """Half of what memory gives in that moment is half, whatever its speed; pauses cost nothing."""
    batch = static(overlap=False)
    memory = Memory(batch, slow_from)
    monkeypatch.setattr(static_batch, "time", memory)
    run = batch.run(batch.prompts(2, 8, seed=0), 1 + 3 * (WARM_STEPS + WINDOW), memory.pause)
    means = windows(run.decode)
    assert len(run.decode) == 3 * WINDOW
    assert len(memory.pauses) == 4
    assert max(run.decode) <= 0.02 + 1e-9
    windowed = zip(means, memory.pauses[:-1], memory.pauses[1:], strict=True)
    steady = [share_of_bound(1e7, mean, a, b) for mean, a, b in windowed if a == b]
    assert steady == pytest.approx([0.5] * len(steady))
    assert len(steady) >= 2


def test_pauses_of_a_short_run() -> None:
    batch, pauses = static(), []
    run = batch.run(batch.prompts(1, 8, 0), WARM_STEPS + 2, lambda: pauses.append(0))
    assert len(run.decode) == 1
    assert len(pauses) == 2


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
