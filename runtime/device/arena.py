"""The memory of a CPU session: four arenas; and what fits, on any device.

An arena is anonymous memory in huge pages, zero until touched: nothing here writes to one, so state
costs what is used of it. `kv_pages` decides the only size chosen at load. Called by the sessions.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import numpy.typing as npt

from runtime.artifact import Manifest
from runtime.errors import NoSpace, UsageError

DEFAULT_SHARE = 0.25  # of the available memory, for the KV pool


class Arena:
    def __init__(self, size: int) -> None:
        self.size = size
        try:
            self._map = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise NoSpace(f"cannot map {size} bytes of memory: {error.strerror}") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without huge pages: slower, not wrong
                self.huge = False
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))


def kv_pages(
    manifest: Manifest, kv_tokens: int | None, available: int, share: float = DEFAULT_SHARE
) -> int:
    """Pages of the KV pool; unless told, at most `share` of the available memory and what the
    longest sequences can fill. Asked for more than fits: refused with both numbers."""
    state, model = manifest.state, manifest.model
    fixed = manifest.weights_bytes + state.pages_offset + manifest.work_bytes + manifest.io_bytes
    room = available - fixed
    if room < 0:
        raise NoSpace(
            f"artifact {manifest.name} needs {fixed >> 20} MiB before any KV page, "
            f"{available >> 20} MiB are available; "
            "free memory or take a smaller quantization"
        )
    if kv_tokens is not None and kv_tokens < state.page_size:
        raise UsageError(f"kv_tokens: {kv_tokens} is less than one page of {state.page_size}")
    least = -(-model.context // state.page_size)
    if kv_tokens is None:
        wanted = max(min(int(available * share), room) // state.page_bytes, least)
        pages = min(wanted, least * manifest.max_seqs)
    else:
        pages = kv_tokens // state.page_size
    if pages * state.page_bytes > room:
        raise NoSpace(
            f"a KV pool of {pages * state.page_size} tokens takes {pages * state.page_bytes >> 20} "
            "MiB, "
            f"{room >> 20} MiB are available beside the model; lower kv_tokens"
        )
    return pages
