"""CRC-32C of memory that other threads are filling: computed without the GIL, joined afterwards.

The arithmetic is the C library of the google-crc32c wheel, called by ctypes because the wheel's own
binding holds the GIL. Joining is Mark Adler's crc32_combine: appending n zero bytes to a message is
a linear map of its CRC over GF(2).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache

from runtime.errors import IncompatibleTarget

POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reversed

Matrix = tuple[int, ...]  # column i is what bit i becomes


@cache
def extend() -> Callable[[int, int, int], int]:
    """`f(crc, address, size)`: the CRC of what `crc` stood for and then `size` bytes at
    `address`."""
    try:
        from google_crc32c import _crc32c
    except ImportError as error:
        raise IncompatibleTarget(
            f"google-crc32c with its C library is needed to check weights ({error}); pip install "
            "'headstart[cuda]'"
        ) from error
    # dlsym also searches the libraries the extension depends on.
    function = ctypes.CDLL(_crc32c.__file__).crc32c_extend
    function.restype = ctypes.c_uint32
    function.argtypes = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t)
    return function


def join(pieces: Iterable[tuple[int, int]]) -> int:
    """CRC of consecutive pieces, each given as (crc, size)."""
    total = 0
    for crc, size in pieces:
        total = shift(total, size) ^ crc
    return total


def shift(crc: int, size: int) -> int:
    """The CRC after `size` zero bytes more (without the final inversion of either)."""
    bit = 0
    while size and crc:
        if size & 1:
            crc = apply(zeros(bit), crc)
        size >>= 1
        bit += 1
    return crc


@cache
def zeros(power: int) -> Matrix:
    """What 2 ** power zero bytes do to a CRC."""
    if power == 0:
        step: Matrix = (POLYNOMIAL, *(1 << i for i in range(31)))  # one bit
        for _ in range(3):
            step = product(step, step)
        return step
    return product(zeros(power - 1), zeros(power - 1))


def product(a: Matrix, b: Matrix) -> Matrix:
    return tuple(apply(a, column) for column in b)


def apply(matrix: Matrix, vector: int) -> int:
    out = 0
    while vector:
        low = vector & -vector
        out ^= matrix[low.bit_length() - 1]
        vector ^= low
    return out
