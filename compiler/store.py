"""Stored weights: which arrays a program's weights become, and writing them to the weights file.

Comes in: a program, the storage format of every logical weight, a source of logical weights. Goes
out: tensor entries with checksums. A few weights are in memory at a time. Called by the pipeline.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import msgspec
import numpy as np
import torch

from compiler.errors import ProgramError
from compiler.memory import Stored
from compiler.pack import HashingFile
from compiler.program import Program, Value
from compiler.quantize import register  # noqa: F401  (fills SCHEMES)
from compiler.quantize.scheme import parse_format
from compiler.weights import Weights, rows, stored
from kernels.cpu import layout as cpu_layout
from kernels.cpu.layout import WIDENED
from kernels.cuda import layout as cuda_layout
from kernels.ops.mlp import GATED
from runtime import weights_file
from runtime.artifact import TensorEntry
from runtime.device.machine import available_memory, cpus
from runtime.weights_file import itemsize

MAKING = 8  # bytes of memory per stored byte while a weight is made, at most
MOST_WORKERS = 8

Constants = Mapping[str, np.ndarray]
LAYOUTS: Mapping[str, Any] = {"cpu": cpu_layout, "cuda": cuda_layout}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One weight of the program: `parts` are its logical weights, `arrays` what the file holds, in
    the layout of `target`."""

    name: str
    format: str
    gated: bool
    parts: tuple[str, ...]
    arrays: tuple[Stored, ...]
    target: str


def stored_weights(
    program: Program, formats: Mapping[str, str], target: str
) -> tuple[StoredWeight, ...]:
    """In load order. `formats` knows the logical weights; everything else is a constant."""
    return tuple(_stored_weight(program, value, formats, target) for value in program.weights())


def narrowed(
    program: Program, formats: Mapping[str, str], in_bfloat16: Callable[[str], bool]
) -> dict[str, str]:
    """`formats` in which float32 matrices of nothing but bfloat16 numbers take half the bytes: the
    CPU kernels widen them again, so no result changes. Those of a merged weight only together."""
    found = dict(formats)
    for value in program.weights():
        parts = value.parts or (value.name,)
        wide = len(value.dims) > 1 and all(formats.get(part) == "float32" for part in parts)
        if wide and all(map(in_bfloat16, parts)):
            found |= dict.fromkeys(parts, WIDENED)
    return found


def weight_formats(weights: Sequence[StoredWeight]) -> dict[str, str]:
    """Storage format by the program's own names, as kernels are asked with."""
    return {weight.name: weight.format for weight in weights}


def _stored_weight(
    program: Program, value: Value, formats: Mapping[str, str], target: str
) -> StoredWeight:
    parts = value.parts or (value.name,)
    kinds = {formats.get(part, "float32") for part in parts}
    acts = {
        call.op == "moe_gate_up" or call.attrs["act"] in GATED
        for call in program.consumers(value.name)
        if call.op in ("linear", "moe_gate_up") and call.ins["w"] == value.name
    }
    if len(kinds) != 1 or len(acts) > 1:
        raise ProgramError(f"weight {value.name} needs one stored form, found {sorted(kinds)}")
    format, gated = kinds.pop(), acts == {True}
    shape = tuple(dim for dim in value.dims if isinstance(dim, int))
    fields = {"data": ("float32", shape)}
    if len(shape) > 1:
        fields = LAYOUTS[target].stack_fields(format, shape, gated)
    arrays = tuple(
        Stored(name=f"{value.name}.{field}", dtype=dtype, shape=dims)
        for field, (dtype, dims) in fields.items()
    )
    return StoredWeight(
        name=value.name, format=format, gated=gated, parts=parts, arrays=arrays, target=target
    )


def pack(weight: StoredWeight, source: Weights, constants: Constants) -> dict[str, np.ndarray]:
    """The arrays of one weight by full name."""
    if weight.name in constants:
        return {f"{weight.name}.data": constants[weight.name]}
    logical = rows(source, weight.parts)
    if logical.dim() == 1:
        return {f"{weight.name}.data": stored(logical, "float32")}
    quantized, layout = parse_format(weight.format), LAYOUTS[weight.target]
    packed: Mapping[str, Any]
    if quantized is None:
        packed = layout.pack_linear(weight.format, stored(logical, weight.format), weight.gated)
    else:
        scheme, group = quantized
        codes, scale = scheme.quantize(logical, group)
        packed = layout.pack_linear(weight.format, (codes.numpy(), scale.numpy()), weight.gated)
    return {f"{weight.name}.{field}": array for field, array in packed.items()}


def exact(weight: StoredWeight, source: Weights, constants: Constants) -> torch.Tensor:
    """The float32 numbers of the model itself."""
    if weight.name in constants:
        return torch.from_numpy(constants[weight.name])
    return rows(source, weight.parts).float()


def rounded(weight: StoredWeight, source: Weights, constants: Constants) -> torch.Tensor:
    """The float32 numbers that the stored form stands for: what accuracy is measured with."""
    logical = exact(weight, source, constants)
    quantized = parse_format(weight.format)
    if logical.dim() == 1 or weight.format == "float32":
        return logical
    if quantized is None:
        return logical.to(torch.bfloat16).float()
    scheme, group = quantized
    codes, scale = scheme.quantize(logical, group)
    return scheme.dequantize(codes, scale)


def write_weights(
    file: HashingFile,
    weights: Sequence[StoredWeight],
    tensors: Sequence[TensorEntry],
    source: Weights,
    constants: Constants,
    progress: Callable[[int], None],
) -> tuple[TensorEntry, ...]:
    """Writes header and data; returns `tensors` with their checksums. `progress` hears bytes."""
    file.write(weights_file.header(tensors))
    done: list[TensorEntry] = []
    pending = iter(tensors)

    def pad(entry: TensorEntry) -> None:
        zeros = memoryview(bytes(entry.size))
        done.append(_write(file, entry, zeros, _crc(zeros)))

    def put(data: memoryview, name: str, crc: int) -> None:
        entry = next(pending)
        while entry.name.startswith(weights_file.PADDING):
            pad(entry)
            entry = next(pending)
        if entry.name != name or entry.size != data.nbytes:
            raise ProgramError(
                f"weights: {name} has {data.nbytes} bytes, "
                f"the layout has {entry.name} with {entry.size}"
            )
        done.append(_write(file, entry, data, crc))
        progress(entry.size)

    def made(weight: StoredWeight) -> list[tuple[str, memoryview, int]]:
        arrays = pack(weight, source, constants)
        views = ((a.name, arrays[a.name]) for a in weight.arrays)
        data = [(name, np.ascontiguousarray(view).data.cast("B")) for name, view in views]
        return [(name, bytes_, _crc(bytes_)) for name, bytes_ in data]

    # Threads make what one thread writes and hashes, in order and only a few weights ahead.
    sizes = (sum(math.prod(a.shape) * itemsize(a.dtype) for a in w.arrays) for w in weights)
    largest = max(sizes, default=1)
    room = available_memory() // (MAKING * largest)
    workers = max(min(cpus(), room, MOST_WORKERS), 1)
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[list[tuple[str, memoryview, int]]]] = deque()
        for weight in (*weights, *[None] * workers):
            if weight is not None:
                ahead.append(pool.submit(made, weight))
            if ahead and (weight is None or len(ahead) > workers):
                for name, data, crc in ahead.popleft().result():
                    put(data, name, crc)
    for entry in pending:
        pad(entry)
    return tuple(done)


def _write(file: HashingFile, entry: TensorEntry, data: memoryview, crc: int) -> TensorEntry:
    file.write(data)
    return msgspec.structs.replace(entry, crc32c=crc)


def _crc(data: memoryview) -> int:
    crc = 0
    for start in range(0, len(data), 1 << 20):  # google_crc32c wants bytes: small copies
        crc = google_crc32c.extend(crc, bytes(data[start : start + (1 << 20)]))
    return crc
