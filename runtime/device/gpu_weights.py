"""Weights on their way from the file to the GPU: parallel reads into page-locked buffers, checked
there, copied while the next are read.

Comes in: an artifact and the address of the weights arena. Goes out: the arena filled and every
tensor's checksum compared. The file is cut into chunks; each reader takes the next one nobody has,
so order and number of readers do not matter. Called by the CUDA session.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.artifact import Artifact, weights_path
from runtime.artifact_files import damaged
from runtime.device import crc32c
from runtime.device.driver import Driver
from runtime.device.gpu_memory import Pinned, make_event, make_stream

CHUNK = 8 << 20  # bytes of one read
BUFFERS = 2  # per reader: one is read into while the other is copied
READERS = 8


@dataclass(slots=True, kw_only=True)
class Load:
    """What the readers share. `pieces[t]`: CRCs of parts of tensor t by their place in it."""

    driver: Driver
    context: Any
    artifact: Artifact
    address: int
    stream: Any
    file: int
    start: int  # of the data in the file
    ends: npt.NDArray[np.int64]  # of the tensors
    chunks: Any = field(default_factory=count)
    pieces: list[list[tuple[int, int, int]]] = field(default_factory=list)
    failed: threading.Event = field(default_factory=threading.Event)


def readers() -> int:
    return min(READERS, len(os.sched_getaffinity(0)))


def load_weights(driver: Driver, context: Any, artifact: Artifact, address: int) -> None:
    """Fills the arena at `address`. Raises DamagedArtifact naming the tensor that is not what the
    manifest says."""
    tensors = artifact.manifest.tensors[0]
    if not tensors:
        return
    crc32c.extend()  # before anything is read: it may be missing
    path, start = artifact.weights_data(0)
    with ExitStack() as stack:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        stack.callback(os.close, file)
        os.posix_fadvise(file, start, 0, os.POSIX_FADV_SEQUENTIAL)
        load = Load(
            driver=driver,
            context=context,
            artifact=artifact,
            address=address,
            stream=make_stream(driver, stack),
            file=file,
            start=start,
            ends=np.array([t.offset + t.size for t in tensors], np.int64),
            pieces=[[] for _ in tensors],
        )
        number = readers()
        pinned = Pinned(driver, number * BUFFERS * CHUNK, stack)
        events = [make_event(driver, stack, timing=False) for _ in range(number * BUFFERS)]
        # Nothing of it may be freed while a copy reads it, whatever went wrong.
        stack.callback(driver, "cuStreamSynchronize", load.stream)
        with ThreadPoolExecutor(number, "weights") as pool:
            jobs = [pool.submit(_reader, load, pinned, events, i) for i in range(number)]
        for job in jobs:
            job.result()
        driver("cuStreamSynchronize", load.stream)
    found = [crc32c.join((crc, size) for _, size, crc in sorted(parts)) for parts in load.pieces]
    artifact.check_crcs(0, found)


def _reader(load: Load, pinned: Pinned, events: list[Any], index: int) -> None:
    """Takes chunks until none is left or another reader failed."""
    driver, total = load.driver, int(load.ends[-1])
    try:
        driver("cuCtxSetCurrent", load.context)
        for turn in count():
            first = next(load.chunks) * CHUNK  # itertools.count is atomic under the GIL
            if first >= total or load.failed.is_set():
                return
            slot = index * BUFFERS + turn % BUFFERS
            if turn >= BUFFERS:
                driver("cuEventSynchronize", events[slot])
            size = min(CHUNK, total - first)
            place = slot * CHUNK
            buffer = pinned.bytes[place : place + size]
            _read(load, buffer, first)
            driver(
                "cuMemcpyHtoDAsync",
                load.address + first,
                pinned.address + place,
                size,
                load.stream,
            )
            driver("cuEventRecord", events[slot], load.stream)
            _check(load, buffer, first)
    except BaseException:
        load.failed.set()
        raise


def _read(load: Load, buffer: npt.NDArray[np.uint8], first: int) -> None:
    done, what = 0, "the file ended"
    while done < len(buffer):
        try:
            got = os.preadv(load.file, [buffer[done:].data], load.start + first + done)
        except OSError as error:
            got, what = 0, error.strerror or str(error)
        if not got:
            raise damaged(
                load.artifact.path,
                weights_path(0),
                f"expected {len(buffer)} bytes at {load.start + first}, found {done} ({what})",
            )
        done += got


def _check(load: Load, buffer: npt.NDArray[np.uint8], first: int) -> None:
    """CRC and finiteness of the parts of tensors in a chunk, while it is copied."""
    tensors, extend = load.artifact.manifest.tensors[0], crc32c.extend()
    at, end = first, first + len(buffer)
    index = int(np.searchsorted(load.ends, first, "right"))
    while at < end:
        tensor = tensors[index]
        stop = min(end, tensor.offset + tensor.size)
        part = buffer[at - first : stop - first]
        crc = extend(0, part.ctypes.data, len(part))
        load.pieces[index].append((at - tensor.offset, len(part), crc))
        load.artifact.check_finite(0, tensor, part)
        at = stop
        index += 1
