"""Measured read bandwidth of a GPU: how fast its memory can be streamed, the bound of decoding.

`DeviceBandwidth(launcher, address, size)` reads memory that is there anyway (a session's weights);
it is what `Bandwidth` is for a CPU. Used by `bench.latency` and `bench.gpu`. The kernel is
kernels/cuda/code/probe.py, built when first needed.
"""

from __future__ import annotations

from statistics import median

from bench.bandwidth import Rate
from bench.errors import BenchError
from compiler.bind import bind, build
from kernels.cuda.kernel import launch
from kernels.launch import Launch, Number, Pointer
from runtime.device.launcher import Launcher

CACHE = "~/.cache/headstart"
WORDS = 4096  # int32 that a program reads at a time
PROGRAMS = (2, 4, 8)  # per multiprocessor


def read_launches(multiprocessors: int, blocks: int) -> list[Launch]:
    """One with each number of programs."""
    return [
        launch(
            "probe.read_kernel",
            (n * multiprocessors, 1, 1),
            warps=8,
            x_ptr=Pointer(arg="x", type="i32"),
            out_ptr=Pointer(arg="out", type="i32"),
            blocks=Number(type="i32", value=blocks),
            BLOCK=WORDS,
            PROGRAMS=n * multiprocessors,
        )
        for n in PROGRAMS
    ]


class DeviceBandwidth:
    """`read` may be called between the things measured; `rate` covers all passes so far."""

    def __init__(self, launcher: Launcher, address: int, size: int, cache: str = CACHE) -> None:
        blocks = size // (4 * WORDS)
        if not blocks:
            raise BenchError(f"{size} bytes are too few to measure a bandwidth: {4 * WORDS} needed")
        self._launcher, self._size = launcher, blocks * 4 * WORDS
        places = {"x": address, "out": launcher.allocate(1 << 20)}
        launches = read_launches(launcher.gpu.multiprocessors, blocks)
        built = build(launches, cache)
        self._graphs = [
            launcher.graph([bind(launcher, x, built, lambda slot: places[slot.arg])])
            for x in launches
        ]
        self._seconds: list[list[float]] = [[] for _ in launches]

    def read(self, passes: int = 4) -> Rate:
        """The rate of `passes` more reads with every number of programs."""
        now = [self._launcher.seconds(graph, passes, warmup=1) for graph in self._graphs]
        for seconds, more in zip(self._seconds, now, strict=True):
            seconds += more
        return self._rate(now)

    @property
    def rate(self) -> Rate:
        """Of all reads so far."""
        return self._rate(self._seconds)

    def _rate(self, seconds: list[list[float]]) -> Rate:
        """That of the best number of programs."""
        fastest = min(seconds, key=min)
        return Rate(best=self._size / min(fastest), median=self._size / median(fastest))

    def release(self) -> None:
        """Leaves the launcher to its owner."""
        for graph in self._graphs:
            graph.close()
        self._graphs = []

    def close(self) -> None:
        self.release()
        self._launcher.close()
