"""Device code: each cubin of an artifact loaded once, its kernels ready to launch.

Comes in: a cubin's bytes and what the manifest says of it. Goes out: a `Function`, after the ABI
that the driver reports was compared with the one parameters are laid out by. Called by the CUDA
session and the launcher; safe to call from several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from runtime.artifact import CudaBinary
from runtime.device.driver import Driver
from runtime.errors import DamagedArtifact

DEFAULT_SHARED = 48 << 10  # dynamic shared memory a kernel may have without asking


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    handle: Any
    binary: CudaBinary


class Code:
    """`read(path)` gives a cubin's checked bytes."""

    def __init__(self, driver: Driver, read: Callable[[str], bytes]) -> None:
        self._driver, self._read, self._stack = driver, read, ExitStack()
        self._lock = threading.Lock()
        self._functions: dict[tuple[str, str], Function] = {}
        self._libraries: dict[str, Any] = {}

    def function(self, binary: CudaBinary) -> Function:
        with self._lock:
            key = binary.path, binary.entry
            if key not in self._functions:
                self._functions[key] = self._load(binary)
            return self._functions[key]

    def close(self) -> None:
        """After every graph of these functions is gone."""
        self._stack.close()

    def _load(self, binary: CudaBinary) -> Function:
        driver = self._driver
        if binary.path not in self._libraries:
            image = self._read(binary.path)
            library = driver("cuLibraryLoadData", image, [], [], 0, [], [], 0)
            self._stack.callback(driver, "cuLibraryUnload", library)
            self._libraries[binary.path] = library
        kernel = driver("cuLibraryGetKernel", self._libraries[binary.path], binary.entry.encode())
        handle = driver("cuKernelGetFunction", kernel)
        check_abi(driver, handle, binary)
        if binary.shared > DEFAULT_SHARED:
            kinds = driver.api.CUfunction_attribute
            most = kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver("cuFuncSetAttribute", handle, most, binary.shared)
        return Function(handle=handle, binary=binary)


def check_abi(driver: Driver, handle: Any, binary: CudaBinary) -> None:
    """The driver takes parameters where the manifest says they are, and no more of them."""
    found: list[tuple[int, int]] = []
    expected = [(p.offset, p.size) for p in binary.parameters]
    for index in range(len(expected) + 1):
        # The index after the last is an error, by which the driver tells that there is none.
        code, *values = driver.api.cuFuncGetParamInfo(handle, index)
        if code != 0:
            break
        found.append((int(values[0]), int(values[1])))
    if found != expected:
        raise DamagedArtifact(
            f"file {binary.path}, kernel {binary.entry}: expected parameters (offset, size) "
            f"{expected}, the driver finds {found}; compile it again"
        )
