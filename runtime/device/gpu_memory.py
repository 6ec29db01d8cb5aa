"""Memory of a GPU: arenas at wished addresses, and page-locked host memory.

Everything allocated is undone by the `ExitStack` it was allocated on, also when the next step
fails. Called by the CUDA session and the launcher.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.device.driver import Driver, Gpu

# Where arenas go if the driver has the room: the same addresses in every process make reports and
# core dumps comparable. Nothing depends on them, plans are relocated.
WISHED = {
    "weights": 0x7A00_0000_0000,
    "state": 0x7B00_0000_0000,
    "work": 0x7C00_0000_0000,
    "io": 0x7D00_0000_0000,
}


class GpuArena:
    """`size` bytes (rounded up to the allocation granularity) of device memory at `address`."""

    def __init__(
        self, driver: Driver, gpu: Gpu, size: int, stack: ExitStack, wish: int = 0
    ) -> None:
        api = driver.api
        kind = api.CUmemAllocationProp()
        kind.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        kind.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        kind.location.id = gpu.index
        flag = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        unit = int(driver("cuMemGetAllocationGranularity", kind, flag))
        self.size = size
        mapped = -(-max(size, 1) // unit) * unit
        # The wish is a hint: the driver may answer with any other address.
        self.address = int(driver("cuMemAddressReserve", mapped, unit, wish, 0))
        stack.callback(driver, "cuMemAddressFree", self.address, mapped)
        handle = driver("cuMemCreate", mapped, kind, 0)
        try:
            driver("cuMemMap", self.address, mapped, 0, handle, 0)
        finally:
            driver("cuMemRelease", handle)  # the mapping keeps the memory
        stack.callback(driver, "cuMemUnmap", self.address, mapped)
        access = api.CUmemAccessDesc()
        access.location = kind.location
        access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        driver("cuMemSetAccess", self.address, mapped, [access], 1)


class Pinned:
    """`size` bytes of page-locked host memory: `bytes` views them, `address` is where."""

    def __init__(self, driver: Driver, size: int, stack: ExitStack) -> None:
        self.size = max(size, 1)
        flags = driver.api.CU_MEMHOSTALLOC_PORTABLE
        self.address = int(driver("cuMemHostAlloc", self.size, flags))
        stack.callback(driver, "cuMemFreeHost", self.address)
        memory = (ctypes.c_uint8 * self.size).from_address(self.address)
        self.bytes: npt.NDArray[np.uint8] = np.ctypeslib.as_array(memory)
        self.bytes[:] = 0


def make_context(driver: Driver, gpu: Gpu, stack: ExitStack) -> Any:
    """The GPU's primary context, current in this thread."""
    context = driver("cuDevicePrimaryCtxRetain", gpu.handle)
    stack.callback(driver, "cuDevicePrimaryCtxRelease", gpu.handle)
    driver("cuCtxSetCurrent", context)
    return context


def make_stream(driver: Driver, stack: ExitStack) -> Any:
    """A stream that waits for no other."""
    stream = driver("cuStreamCreate", driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING)
    stack.callback(driver, "cuStreamDestroy", stream)
    return stream


def make_event(driver: Driver, stack: ExitStack, *, timing: bool) -> Any:
    flags = driver.api.CUevent_flags
    kind = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
    event = driver("cuEventCreate", kind)
    stack.callback(driver, "cuEventDestroy", event)
    return event
