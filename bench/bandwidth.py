"""Measured read bandwidth: how fast this machine's cores can stream a buffer of a given size from
memory.

`Bandwidth(bytes, call)` holds a huge-page buffer (the size of a model's weights, so that the same
caches help or do not); `read()` times passes over it by the threads of a team: a session's own
(`CpuSession.call`), so that nothing sleeps, wakes or moves to another core between its steps and
the reads, or those of `kernels.cpu.run.Team`. Used by `bench.latency` and `bench.peers` for their
per-cent-of-bound columns: memory that other machines share changes its speed within seconds, so
they read before and after every few steps, and `share_of_bound` compares those steps with those two
reads alone. `python -m bench.bandwidth` prints the table.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from bench.errors import BenchError
from kernels import toolchain
from kernels.cpu.run import Team
from kernels.toolchain import supported_levels

SOURCE = Path(__file__).with_name("bandwidth.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", f"-I{toolchain.SOURCES}")
PREFETCH_BYTES = (1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Bytes per second: the best pass (the machine's limit) and the median one (what it gave, other
    load included)."""

    best: float
    median: float


def share_of_bound(read_bytes: float, seconds: float, before: Rate, after: Rate) -> float:
    """The time to read `read_bytes` at the speed of the two reads next to a step, over the step's
    `seconds`. The speed is that of median passes, the time the mean of both: what memory gave just
    then, so that a step can come out a little above 1.
    """
    return read_bytes * (1 / before.median + 1 / after.median) / 2 / seconds


def _library(cache: Path) -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "c++")
    text = SOURCE.read_bytes() + (toolchain.SOURCES / "abi.h").read_bytes()
    key = hashlib.sha256(text + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    path = cache / f"bandwidth-{key}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"{compiler} cannot build {SOURCE.name}: {done.stderr.strip()[-500:]}")
        os.replace(temporary, path)
    library = ctypes.CDLL(str(path))
    library.bandwidth_open.restype = ctypes.c_void_p
    library.bandwidth_open.argtypes = [ctypes.c_size_t]
    library.bandwidth_close.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


class Bandwidth:
    """A buffer to read. `read` is called between the things measured and gives the rate of that
    moment; `rate` covers all passes so far. `call(function, argument)` runs the shares of a native
    function on a team's threads and gives its seconds."""

    def __init__(
        self, size: int, call: Callable[[int, int], float], cache: Path | None = None
    ) -> None:
        self._library = _library(cache or Path("~/.cache/headstart/bench").expanduser())
        self._size, self._call = max(size, 1 << 20), call
        self._base = self._library.bandwidth_open(self._size)
        if not self._base:
            raise BenchError(f"no memory for a buffer of {self._size} bytes to read: free some")
        self._pass = ctypes.cast(self._library.bandwidth_pass, ctypes.c_void_p).value or 0
        self._kept = np.zeros(1, np.int32)
        self._seconds: dict[int, list[float]] = {ahead: [] for ahead in PREFETCH_BYTES}

    def read(self, passes: int = 3) -> Rate:
        """The rate of `passes` more reads at every prefetch distance."""
        now = {ahead: [self.read_once(ahead) for _ in range(passes)] for ahead in self._seconds}
        for ahead, seconds in now.items():
            self._seconds[ahead] += seconds
        return self._rate(now)

    def read_once(self, ahead: int) -> float:
        """One pass with the prefetch so many bytes ahead, which counts for no rate; its seconds."""
        slots = np.array((self._base, self._size, ahead, self._kept.ctypes.data), np.uint64)
        return self._call(self._pass, slots.ctypes.data)

    @property
    def kept(self) -> int:
        """The xor of all words read so far, as 32-bit numbers."""
        return int(self._kept[0])

    @property
    def rate(self) -> Rate:
        """Of all reads so far."""
        return self._rate(self._seconds)

    def _rate(self, seconds: dict[int, list[float]]) -> Rate:
        """That of the best prefetch distance."""
        fastest = min(seconds.values(), key=min)
        return Rate(best=self._size / min(fastest), median=self._size / median(fastest))

    def close(self) -> None:
        if self._base:
            self._library.bandwidth_close(self._base, self._size)
            self._base = None


def main() -> int:
    threads = len(os.sched_getaffinity(0))
    print(f"{'MiB':>8} {'threads':>8} {'best GB/s':>10} {'median GB/s':>12}")
    for mebibytes in (64, 128, 256, 512, 1024, 2048):
        for count in sorted({1, threads}):
            with (
                Team(supported_levels()[-1].name, count) as team,
                closing(Bandwidth(mebibytes << 20, team.call)) as buffer,
            ):
                rate = buffer.read(8)
            print(f"{mebibytes:>8} {count:>8} {rate.best / 1e9:>10.1f} {rate.median / 1e9:>12.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
