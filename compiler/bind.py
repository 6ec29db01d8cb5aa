"""Kernels' launches as calls of the runtime's launcher.

Comes in: launches, built binaries, and where each slot lies. Goes out: `Call`s, loaded and with
their argument bytes in ABI order.
Called by tuning and by the benchmarks that run single kernels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compiler.binaries import PACK, described, tensor_map
from kernels.cuda.build import build_cuda
from kernels.launch import Binary, Descriptor, Launch, Number, Parameter, Pointer, Slot, Source
from runtime.artifact import (
    FLAG_PROGRAMMATIC,
    PARAM_ADDRESS,
    PARAM_TENSORMAP,
    LaunchPlan,
)
from runtime.device.launcher import Call, Launcher

Address = Callable[[Pointer | Descriptor], int]
Built = Mapping[Source, tuple[Binary, bytes]]


def build(launches: Iterable[Launch], cache: str) -> Built:
    sources = [launch.source for launch in launches if launch.source is not None]
    return build_cuda(sources, Path(cache).expanduser())


def bind(launcher: Launcher, launch: Launch, built: Built, address: Address) -> Call:
    assert launch.source is not None
    binary, image = built[launch.source]
    x, y, z = launch.grid
    return Call(
        function=launcher.load(image, described(binary)),
        grid=(x * binary.cluster, y, z),
        arguments=tuple(
            argument(launcher, parameter, launch.slots.get(parameter.name), binary, address)
            for parameter in binary.parameters
        ),
        programmatic=binary.pdl,
    )


def argument(
    launcher: Launcher, parameter: Parameter, slot: Slot | None, binary: Binary, address: Address
) -> bytes:
    if parameter.kind in ("scratch", "null"):
        return bytes(parameter.size)
    if isinstance(slot, Number):
        return struct.pack(PACK[slot.type], slot.value)
    if isinstance(slot, Pointer):
        return address(slot).to_bytes(8, "little")
    assert isinstance(slot, Descriptor), f"no slot for parameter {parameter.name}"
    if parameter.kind == "tensormap":
        map = tensor_map(slot, binary.maps[parameter.name], 0, 0)
        return launcher.map(map, address(slot))
    axes = slot.shape if parameter.kind == "shape" else slot.strides
    return axes[parameter.axis].to_bytes(parameter.size, "little")


def bind_plan(
    launcher: Launcher,
    plan: LaunchPlan,
    binaries: Iterable[Binary],
    images: Mapping[str, bytes],
    bases: Sequence[int],
) -> list[Call]:
    """Every node of a plan, its arenas at `bases` (in the order of ARENAS)."""
    known = {described(binary).path: binary for binary in binaries}
    calls = []
    for node in plan.nodes:
        binary = known[plan.header.kernels[int(node["kernel"])].file]
        first, count = int(node["first_param"]), int(node["params"])
        x, y, z = (int(n) for n in node["grid"])
        calls.append(
            Call(
                function=launcher.load(images[binary.sha256], described(binary)),
                grid=(x, y, z),
                arguments=tuple(
                    _stored(launcher, plan, row, bases)
                    for row in plan.params[first : first + count]
                ),
                programmatic=bool(int(node["flags"]) & FLAG_PROGRAMMATIC),
            )
        )
    return calls


def _stored(
    launcher: Launcher, plan: LaunchPlan, row: npt.NDArray[np.void], bases: Sequence[int]
) -> bytes:
    if int(row["kind"]) == PARAM_TENSORMAP:
        map = plan.header.tensormaps[int(row["aux"])]
        return launcher.map(map, bases[map.arena])
    value = int(row["value"])
    if int(row["kind"]) == PARAM_ADDRESS:
        value += bases[int(row["arena"])]
    return value.to_bytes(8, "little")[: int(row["size"])]
