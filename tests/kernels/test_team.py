"""What the team gives a kernel (kernels/cpu/abi.h): pieces, each once, and the weights that its
share reads next. With kernels of our own (team_probe.cpp), linked with the team alone."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from kernels.cpu.run import Array, typed
from kernels.toolchain import FLAGS, SOURCES, find_compiler

THREADS = (1, 2, 3, 7, 24)  # more than there are cores: some are late
NEVER = 1 << 40


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("team") / "probe.so"
    sources = ("plan.cpp", "storage.cpp", str(Path(__file__).with_name("team_probe.cpp")))
    command = (find_compiler(), *FLAGS, f"-I{SOURCES}", *sources, "-shared", "-o", str(path))
    subprocess.run(command, check=True, cwd=SOURCES)
    return typed(path)


@contextmanager
def team(library: ctypes.CDLL, threads: int) -> Iterator[int]:
    handle = library.hs_open(threads)
    yield handle
    library.hs_close(handle)


def entry(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def take(
    library: ctypes.CDLL,
    handle: int,
    count: int,
    most: list[int],
    *,
    phases: int = 1,
    first: int = -1,
) -> tuple[Array, Array]:
    """How often each piece was taken, and the share that took it last."""
    times, by = np.zeros(count, np.int32), np.full(count, -1, np.int32)
    limits, total = np.array(most, np.int64), np.zeros(1, np.int32)
    pointers = (array.ctypes.data for array in (limits, times, by, total))
    slots = np.array([count, phases, 0, *pointers], np.uint64)
    slots[2:3].view(np.int64)[0] = first
    assert library.hs_run(handle, entry(library, "probe_take"), slots.ctypes.data) >= 0
    return times, by


def bounds(count: int, threads: int) -> list[int]:
    return [count * share // threads for share in range(threads + 1)]


@pytest.mark.parametrize("threads", THREADS)
def test_every_piece_is_taken_once_in_every_phase(library: ctypes.CDLL, threads: int) -> None:
    """Also with fewer pieces than shares, and none at all; counts differ from run to run."""
    with team(library, threads) as handle:
        for count in [0, 1, 2, threads - 1, threads + 1, 100, 1009] * 5:
            for phases in (1, 3):
                times, by = take(library, handle, count, [NEVER] * threads, phases=phases)
                assert (times == phases).all() and ((by >= 0) & (by < threads)).all(), count


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("count", [7, 64, 1009])
def test_a_share_takes_its_own_range_first(library: ctypes.CDLL, threads: int, count: int) -> None:
    """Every share stops behind its range until all the others have been through theirs."""
    edges = bounds(count, threads)
    most = [end - begin for begin, end in pairwise(edges)]
    with team(library, threads) as handle:
        times, by = take(library, handle, count, most)
    assert (times == 1).all()
    assert by.tolist() == np.repeat(np.arange(threads), most).tolist()


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("slow", [0, 1])
def test_what_a_slow_share_leaves_is_taken_by_others(
    library: ctypes.CDLL, threads: int, slow: int
) -> None:
    """It holds one piece, the first of its range, until the others have done all the rest."""
    count = 100
    most = [1 if share == slow else NEVER for share in range(threads)]
    with team(library, threads) as handle:
        times, by = take(library, handle, count, most, first=slow)
    assert (times == 1).all()
    assert np.flatnonzero(by == slow).tolist() == [bounds(count, threads)[slow]]


def plan(library: ctypes.CDLL, handle: int, nodes: list[tuple[str, Array]]) -> int:
    entries = np.array([entry(library, name) for name, _ in nodes], np.uint64)
    slots = np.array([array.ctypes.data for _, array in nodes], np.uint64)
    return int(library.hs_plan(handle, len(nodes), entries.ctypes.data, slots.ctypes.data))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_node_knows_what_the_next_reader_begins_with(library: ctypes.CDLL, threads: int) -> None:
    """The next one only, its own share of it, and nothing behind the last: a plan's end, a plan
    without readers, a job of one function."""
    names = ["probe_then", "probe_reader", "probe_then", "probe_reader", "probe_then"]
    next_reader = [1, 3, 3, None, None]
    found = np.full((len(names), threads, 2), -1, np.int64)
    weights = [1000 * (i + 1) for i in range(len(names))]
    slots = [
        np.array([out.ctypes.data, weight], np.uint64)
        for out, weight in zip(found, weights, strict=True)
    ]
    with team(library, threads) as handle:
        for chosen in (range(len(names)), [0, 2, 4]):
            found[:] = -1
            made = plan(library, handle, [(names[i], slots[i]) for i in chosen])
            ticket = library.hs_submit(handle, made, None, None, 0, None, 0, 0)
            assert library.hs_wait(handle, ticket) >= 0
            library.hs_plan_free(made)
            for i in chosen:
                reader = next_reader[i] if len(chosen) == len(names) else None
                want = [
                    (weights[reader] + share, weights[reader]) if reader is not None else (0, 0)
                    for share in range(threads)
                ]
                assert [tuple(pair) for pair in found[i].tolist()] == want, (i, chosen)
        found[0] = -1
        library.hs_run(handle, entry(library, "probe_then"), slots[0].ctypes.data)
        assert not found[0].any()
