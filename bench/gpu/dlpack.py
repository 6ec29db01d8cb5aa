"""Memory at an address as a DLPack capsule: `torch.from_dlpack(DlPack(address, "cuda"))`.

The structures are those of dlpack.h (version 0.8); the memory stays its owner's.
"""

from __future__ import annotations

import ctypes
from typing import Any

INT = 0  # type code
DEVICES = {"cpu": 1, "cuda": 2}


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("axes", ctypes.c_int32),
        ("type", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [
        ("tensor", Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class DlPack:
    """int32 [count] at `address`. Must outlive what is made of it."""

    def __init__(self, address: int, device: str, count: int = 1024) -> None:
        self._device = DEVICES[device]
        self._shape = (ctypes.c_int64 * 1)(count)
        self._managed = Managed(
            tensor=Tensor(
                data=address,
                device=Device(self._device, 0),
                axes=1,
                type=DataType(INT, 32, 1),
                shape=self._shape,
                strides=None,
                offset=0,
            ),
            context=None,
            deleter=None,
        )

    def __dlpack__(self, **wishes: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device, 0
