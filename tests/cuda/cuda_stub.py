"""The stub driver for Python: built once per session, loaded under the name of the real one.

`load()` gives a `Stub`, or skips the test: a process that has a real driver keeps it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("cuda_stub.cpp")
HOOK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_uint)
)
OUT_OF_MEMORY, NO_DEVICE = 2, 100


class Stub:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.stub_log.restype = ctypes.c_char_p
        library.stub_live.restype = ctypes.c_long
        library.stub_set.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
        library.stub_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
        library.stub_image.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p]

    def reset(self) -> None:
        self._library.stub_reset()

    def set(self, name: str, value: int) -> None:
        """devices, capability (90), driver (13000), free, shared, wishes (granted or not), cubins
        (real ones need not be registered), log (calls are written down), hang_block and
        fault_block (kernels of so many threads hang, or fault)."""
        self._library.stub_set(name.encode(), value)

    def fail(self, call: str, nth: int, code: int) -> None:
        self._library.stub_fail(call.encode(), nth, code)

    def image(self, data: bytes, entries: dict[str, list[tuple[int, int]]]) -> None:
        """An image the driver accepts, and (offset, size) of its entries' parameters."""
        lines = (f"{n} {' '.join(f'{o},{s}' for o, s in p)}" for n, p in entries.items())
        self._library.stub_image(data, len(data), "\n".join(lines).encode())

    def hook(self, function: object) -> None:
        """`function(entry, params, grid)` runs for every node of a launched graph."""
        self._hook = HOOK(function)  # kept alive
        self._library.stub_hook(self._hook)

    @property
    def calls(self) -> list[list[str]]:
        """Name and arguments of every call since the reset."""
        return [line.split() for line in self._library.stub_log().decode().splitlines()]

    def named(self, name: str) -> list[list[str]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def live(self, kind: str = "") -> int:
        """Objects that exist, all kinds or one."""
        return int(self._library.stub_live(kind.encode()))


@cache
def build() -> Path:
    """libcuda.so.1 in a folder of its own, for LD_LIBRARY_PATH."""
    path = Path(tempfile.mkdtemp(prefix="cuda-stub-")) / "libcuda.so.1"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE)]
    subprocess.run(
        [*command, "-Wl,-soname,libcuda.so.1", "-o", str(path)], check=True, capture_output=True
    )
    return path


def environment(**settings: int) -> dict[str, str]:
    """For a process whose driver is the stub: real cubins, no log, and `settings`; its Triton
    compiles, whatever this one's does."""
    given = {"cubins": 1, "log": 0, "free": 2 << 30, **settings}
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {
        **inherited,
        "LD_LIBRARY_PATH": str(build().parent),
        **{f"CUDA_STUB_{name}": str(value) for name, value in given.items()},
    }


@cache
def _load() -> Stub | str:
    try:
        from cuda.bindings import driver  # noqa: F401
    except ImportError:
        return "cuda-bindings is not installed"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        return "this machine has a CUDA driver"
    path = build()
    # The bindings look for a library of this name among the loaded ones first.
    return Stub(ctypes.CDLL(str(path), mode=os.RTLD_GLOBAL | os.RTLD_NOW))


def load() -> Stub:
    stub = _load()
    if isinstance(stub, str):
        pytest.skip(stub)
    stub.reset()
    return stub
