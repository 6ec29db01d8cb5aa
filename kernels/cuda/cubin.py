"""Facts out of a cubin (ELF64): parameter layout, registers, stack, block size. Needs no driver.

The records are NVIDIA's EIATTR notes in the `.nv.info` sections: format u8, attribute u8, u16 value
or length, data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

_PARAM, _PARAM_BYTES, _BLOCK, _CLUSTER = 0x17, 0x19, 0x10, 0x3D
_MOST_THREADS, _REGISTERS, _STACK = 0x05, 0x2F, 0x12


@dataclass(slots=True, kw_only=True)
class Entry:
    """`parameters`: (offset, size) in bytes, in ABI order. `block`, `cluster`: as the code
    requires them, `most_threads` as it limits them, or None."""

    parameters: list[tuple[int, int]] = field(default_factory=list)
    parameter_bytes: int = 0
    block: tuple[int, int, int] | None = None
    cluster: tuple[int, int, int] | None = None
    most_threads: tuple[int, int, int] | None = None
    registers: int = 0
    stack: int = 0


def read(image: bytes) -> tuple[dict[str, Entry], int]:
    """Entries by name, and the ELF ABI version (7: loads on CUDA 12 drivers, 8: 13 and newer).
    Raises ValueError when the bytes are no cubin."""
    if image[:4] != b"\x7fELF" or len(image) < 64:
        raise ValueError(f"not a cubin: expected an ELF image, found {image[:4]!r}")
    sections = list(_sections(image))
    by_name = {name: (offset, size) for name, offset, size in sections}
    entries: dict[str, Entry] = {}
    for name, offset, size in sections:
        if name.startswith(".nv.info."):
            entries[name.removeprefix(".nv.info.")] = _entry(image[offset : offset + size])
    strings, symbols, info = by_name[".strtab"][0], by_name[".symtab"][0], by_name[".nv.info"]
    for attribute, data in _attributes(image[info[0] : sum(info)]):
        if attribute in (_REGISTERS, _STACK):
            symbol, value = struct.unpack("<II", data)
            (start,) = struct.unpack_from("<I", image, symbols + 24 * symbol)
            name = _string(image, strings + start)
            if name in entries:
                if attribute == _REGISTERS:
                    entries[name].registers = value
                else:
                    entries[name].stack = value
    return entries, image[8]


def _entry(data: bytes) -> Entry:
    entry = Entry()
    parameters: dict[int, tuple[int, int]] = {}
    for attribute, value in _attributes(data):
        if attribute == _PARAM:
            _, index, offset, width = struct.unpack("<IHHI", value)
            parameters[index] = (offset, width >> 18)
        elif attribute == _PARAM_BYTES:
            entry.parameter_bytes = int.from_bytes(value, "little")
        elif attribute == _BLOCK:
            entry.block = struct.unpack("<III", value)
        elif attribute == _CLUSTER:
            entry.cluster = struct.unpack("<III", value)
        elif attribute == _MOST_THREADS:
            entry.most_threads = struct.unpack("<III", value)
    entry.parameters = [parameters[index] for index in sorted(parameters)]
    return entry


def _sections(image: bytes) -> Iterator[tuple[str, int, int]]:
    (table,) = struct.unpack_from("<Q", image, 0x28)
    width, count, names = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, table + i * width) for i in range(count)]
    for header in headers:
        yield _string(image, headers[names][4] + header[0]), header[4], header[5]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        form, attribute, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == 4:  # sized: `value` bytes follow
            yield attribute, data[at : at + value]
            at += value
        else:
            yield attribute, value.to_bytes(2, "little")


def _string(image: bytes, start: int) -> str:
    return image[start : image.index(b"\0", start)].decode()
