"""The native plan loop: order of steps, copies, tickets, shutdown, thread count; reading and
checking of weight files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kernels.cpu.register  # noqa: F401
from kernels.cpu.run import Node, Team, aligned, load
from kernels.kernel import KERNELS, CallShape
from kernels.toolchain import supported_levels
from runtime.device.native import ABI

LEVEL = supported_levels()[-1].name
ADD = next(k for k in KERNELS["cpu"] if k.name == "add")
WIDTH = 40


@pytest.fixture(params=[1, 2, 4])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    with Team(LEVEL, request.param) as opened:
        yield opened


class Io:
    """An io arena of (live, a, b, out) and the plan out = a + b over it."""

    def __init__(self, team: Team, rows: int = 3) -> None:
        self.arena = aligned(np.zeros(64 + 3 * rows * WIDTH * 4, np.uint8))
        size = rows * WIDTH * 4
        self.out_offset, self.out_bytes, self.upload = 64 + 2 * size, size, 64 + 2 * size
        live = self.arena[:32].view(np.int32)
        a, b, out = (
            self.arena[64 + i * size : 64 + (i + 1) * size].view(np.float32).reshape(rows, WIDTH)
            for i in range(3)
        )
        shapes = {"a": a.shape, "b": b.shape, "out": out.shape}
        call = CallShape(op="add", shapes=shapes, dtypes={}, formats={}, attrs={})
        self.node: Node = team.bind(ADD, call, {"live": live, "a": a, "b": b, "out": out})
        self.plan = team.plan([self.node])
        self.team, self.rows = team, rows

    def staging(self, value: float) -> np.ndarray:
        staging = np.zeros(self.upload, np.uint8)
        staging[:32].view(np.int32)[0] = self.rows
        staging[64:].view(np.float32)[:] = value
        return staging

    def submit(self, staging: np.ndarray, out: np.ndarray) -> int:
        lib, handle = self.team.library, self.team.handle
        return int(
            lib.hs_submit(
                handle,
                self.plan,
                self.arena.ctypes.data,
                staging.ctypes.data,
                self.upload,
                out.ctypes.data,
                self.out_offset,
                self.out_bytes,
            )
        )


def test_steps_run_in_order_with_their_own_copies(team: Team) -> None:
    io = Io(team)
    n = 300  # more than the queue holds
    staged = [io.staging(i) for i in range(n)]
    outs = [np.full((io.rows, WIDTH), -1, np.float32) for _ in range(n)]
    tickets = [io.submit(s, o) for s, o in zip(staged, outs, strict=True)]
    assert tickets == list(range(tickets[0], tickets[0] + n))
    assert team.library.hs_wait(team.handle, tickets[-1]) >= 0
    for i, out in enumerate(outs):
        assert (out == 2 * i).all(), i
    assert team.library.hs_wait(team.handle, tickets[0]) >= 0, (
        "an old ticket can still be asked for"
    )
    assert team.library.hs_wait(team.handle, tickets[-1] + 1) == -1.0, "a ticket never issued"


def test_dead_rows_are_not_touched(team: Team) -> None:
    io = Io(team)
    staging = io.staging(1.0)
    staging[:32].view(np.int32)[0] = 1
    out = np.zeros((io.rows, WIDTH), np.float32)
    team.library.hs_wait(team.handle, io.submit(staging, out))
    assert (out[0] == 2).all() and (out[1:] == 0).all()


def test_close_finishes_what_was_submitted() -> None:
    outs = [np.zeros((3, WIDTH), np.float32) for _ in range(20)]
    with Team(LEVEL, 2) as team:
        io = Io(team)
        staged = [io.staging(i + 1) for i in range(20)]
        for s, o in zip(staged, outs, strict=True):
            io.submit(s, o)
    assert all((o == 2 * (i + 1)).all() for i, o in enumerate(outs))


def test_thread_count_and_idle_close() -> None:
    before = len(os.listdir("/proc/self/task"))
    for threads in (1, 3):
        with Team(LEVEL, threads):
            assert len(os.listdir("/proc/self/task")) == before + threads
        assert len(os.listdir("/proc/self/task")) == before


def test_idle_threads_use_no_processor_time() -> None:
    with Team(LEVEL, 2) as team:
        io = Io(team)
        out = np.zeros((3, WIDTH), np.float32)
        staging = io.staging(1)
        team.library.hs_wait(team.handle, io.submit(staging, out))
        tasks = [Path(f"/proc/self/task/{task}") for task in os.listdir("/proc/self/task")]
        ours = [t for t in tasks if (t / "comm").read_text().strip() == "hs-worker"]
        assert len(ours) == 2
        states: set[str] = set()
        for _ in range(2000):  # until the bounded spin has ended
            states = {(t / "stat").read_text().rpartition(")")[2].split()[0] for t in ours}
            if states == {"S"}:
                break
            os.sched_yield()
        assert states == {"S"}


def test_refuses_a_senseless_team() -> None:
    library = load(LEVEL)
    assert (
        library.hs_open(0) is None
        and library.hs_open(-1) is None
        and library.hs_open(100_000) is None
    )
    assert library.hs_abi() == ABI


def test_profile_counts_every_node(team: Team) -> None:
    io = Io(team)
    plan = team.plan([io.node, io.node])
    seconds = np.zeros(2)
    team.library.hs_plan_profile(plan, seconds.ctypes.data)
    took = team.run(plan)
    assert (seconds > 0).all() and seconds.sum() <= took
    team.library.hs_plan_profile(plan, None)
    kept = seconds.copy()
    team.run(plan)
    assert (seconds == kept).all()


def test_read_file_range(team: Team, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 9_500_001, np.uint8)
    path = tmp_path / "weights"
    path.write_bytes(data.tobytes())
    read = team.library.hs_read
    into = np.zeros(len(data), np.uint8)
    assert read(team.handle, str(path).encode(), 0, into.ctypes.data, len(data)) == 0
    np.testing.assert_array_equal(into, data)
    assert read(team.handle, str(path).encode(), 777, into.ctypes.data, 5_000_000) == 0
    np.testing.assert_array_equal(into[:5_000_000], data[777:5_000_777])
    assert read(team.handle, str(path).encode(), 0, into.ctypes.data, 0) == 0
    assert read(team.handle, str(tmp_path / "none").encode(), 0, into.ctypes.data, 1) == 2  # ENOENT
    assert (
        read(team.handle, str(path).encode(), len(data) - 10, into.ctypes.data, 11) == 5
    )  # EIO: past the end


def crc32c(data: bytes) -> int:
    """Bit by bit, from the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("level", [v.name for v in supported_levels()])
def test_crc32c(level: str) -> None:
    rng = np.random.default_rng(1)
    small = [
        b"123456789",
        b"",
        b"a",
        *(rng.bytes(n) for n in (7, 8, 23, 24, 25, 63, 64, 1000, 3001)),
    ]
    assert crc32c(small[0]) == 0xE3069283
    # Pieces of 4 MiB are joined by arithmetic: a long tensor equals itself reached through two
    # independent paths.
    long = rng.bytes(9 << 20)
    blobs = [*small, long, long[: 4 << 20], long[(4 << 20) :], bytes(5 << 20)]
    base = np.frombuffer(b"".join(blobs), np.uint8)
    sizes = np.array([len(b) for b in blobs], np.int64)
    offsets = np.concatenate(([0], sizes.cumsum()[:-1])).astype(np.int64)
    results = []
    for threads in (1, 3):
        out = np.zeros(len(blobs), np.uint32)
        with Team(level, threads) as team:
            pointers = (base.ctypes.data, offsets.ctypes.data, sizes.ctypes.data, out.ctypes.data)
            team.library.hs_crc32c(team.handle, *pointers, len(blobs))
        results.append(out)
    np.testing.assert_array_equal(results[0], results[1])
    assert [int(c) for c in results[0][: len(small)]] == [crc32c(b) for b in small]
    n = len(small)
    assert int(results[0][n]) == combine(int(results[0][n + 1]), int(results[0][n + 2]), 5 << 20)
    assert int(results[0][n + 3]) == combine(zeros_of(4 << 20), zeros_of(1 << 20), 1 << 20)


def zeros_of(size: int) -> int:
    """CRC of a power of two of zero bytes."""
    crc, have = crc32c(bytes(1)), 1
    while have < size:
        crc, have = combine(crc, crc, have), 2 * have
    return crc


def combine(first: int, second: int, length: int) -> int:
    """crc(a + b) from crc(a), crc(b), |b|: zlib's matrix method, with our polynomial."""
    if length == 0:
        return first
    matrix = [0x82F63B78, *(1 << i for i in range(31))]

    def times(m: list[int], v: int) -> int:
        total = 0
        for i in range(32):
            if v >> i & 1:
                total ^= m[i]
        return total

    for _ in range(3):  # one zero bit -> eight
        matrix = [times(matrix, c) for c in matrix]
    while length:
        if length & 1:
            first = times(matrix, first)
        matrix = [times(matrix, c) for c in matrix]
        length >>= 1
    return first ^ second
