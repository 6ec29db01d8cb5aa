"""Every CUDA kernel is built, without a GPU, for every architecture there is a target for, in
configurations from all over its search space.

Calls are the samples of the kernel's op, in bfloat16 and float32, every storage format and kind of
bucket, and each of them again with WIDE rows, where other tiles are searched. Of the pairs (call,
configuration) so few are built, chosen greedily, that each kernel meets every pair of values of its
configuration's fields (of one launch: launches are searched one at a time), every storage format,
element type and kind of bucket, and with each of these its default. HEADSTART_ALL_CONFIGS=1: every
configuration in at least one call, some five thousand cubins.

How many spill is printed (-rP); defaults for bfloat16 activations must not. The build itself
compares parameters, block and ABI with the declaration.
"""

from __future__ import annotations

import functools
import heapq
import os
from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import combinations
from typing import Any

import cuda_harness
import pytest

import kernels.cuda.register
import kernels.ops.register  # noqa: F401
from conf.load import CONF, group_values
from kernels.cuda import nvcc
from kernels.cuda.build import ARCHITECTURES, build_each
from kernels.cuda.kernel import Config, CudaKernel
from kernels.cuda.product import SHARED
from kernels.kernel import KERNELS, CallShape
from kernels.launch import Source
from kernels.op import OPS

WIDE = 512
ROWS = {"tokens": WIDE, "seqs": WIDE, "x_rows": WIDE, "R": WIDE, "seqs+1": WIDE + 1}
REGISTERS = 1 << 16  # of a multiprocessor
EVERY = bool(os.environ.get("HEADSTART_ALL_CONFIGS"))
TARGETS = (group_values("target", path.stem) for path in (CONF / "target").glob("*.yaml"))
ARCHS = sorted({str(target["arch"]) for target in TARGETS if target["kind"] == "cuda"})

Point = tuple[CallShape, Any]


@functools.cache
def calls(name: str) -> list[CallShape]:
    op = OPS[name]
    samples = [
        case.call for dtype in cuda_harness.DTYPES for _, case in cuda_harness.cases(op, dtype)
    ]
    return [*samples, *(widened(call) for call in samples)]


def widened(call: CallShape) -> CallShape:
    op = OPS[call.op]

    def sizes(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        dims = op.arg(name).dims
        if len(dims) != len(shape):  # KV pages are listed by their bytes
            return shape
        return (ROWS.get(dims[0], shape[0]), *shape[1:])

    return replace(call, shapes={name: sizes(name, shape) for name, shape in call.shapes.items()})


def points(kernel: CudaKernel) -> list[Point]:
    accepted = (call for call in calls(kernel.op) if kernel.accepts(call) is None)
    return [(call, config) for call in accepted for config in kernel.candidates(call)]


def values(config: Any, part: str = "") -> Iterator[Hashable]:
    """Values of fields and pairs of them, within each of the configurations it is made of."""
    plain = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from values(value, f"{part}.{field.name}")
        else:
            plain.append((field.name, value))
    yield from ((part, *some) for n in (1, 2) for some in combinations(plain, n))


def covers(kernel: CudaKernel, call: CallShape, config: Any) -> frozenset[Hashable]:
    types = frozenset(call.dtypes.values())
    traits = (types, frozenset(call.formats.items()), call.attrs.get("kv_dtype"), call.kind)
    default = config == kernel.default(call)
    met: set[Hashable] = {*values(config), *((i, t, default) for i, t in enumerate(traits))}
    return frozenset({*met, config} if EVERY else met)


def chosen(kernel: CudaKernel) -> list[Point]:
    """Always the point that adds most (gains only fall, so an old one is an upper bound)."""
    found = points(kernel)
    facts = [covers(kernel, *point) for point in found]
    left = set().union(*facts)
    heap = [(-len(met), i) for i, met in enumerate(facts)]
    heapq.heapify(heap)
    result = []
    while left:
        bound, i = heapq.heappop(heap)
        gain = len(facts[i] & left)
        if gain == -bound:
            result.append(found[i])
            left -= facts[i]
        elif gain:
            heapq.heappush(heap, (-gain, i))
    return result


def sources(kernel: CudaKernel, call: CallShape, config: Any) -> Iterator[Source]:
    for launch in kernel.launches(call, config):
        assert launch.source is not None
        yield launch.source


def named(kernel: CudaKernel) -> str:
    return kernel.name


@pytest.mark.parametrize("arch", ARCHS)
def test_targets_are_architectures_of_the_build(arch: str) -> None:
    assert arch in ARCHITECTURES


@pytest.mark.parametrize("kernel", KERNELS["cuda"], ids=named)
def test_configurations_are_frozen_and_defaults_valid(kernel: CudaKernel) -> None:
    for call, config in points(kernel):
        assert isinstance(config, Config) and hash(config) == hash(replace(config))
        if config == kernel.default(call):
            assert kernel.valid(call, config) is None, (call, config)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KERNELS["cuda"], ids=named)
def test_configurations_build_as_declared(
    kernel: CudaKernel, arch: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    picked = chosen(kernel)
    wanted = {source: point for point in picked for source in sources(kernel, *point)}
    missing = nvcc.missing()
    if missing in {kernel.accepts(call) for call in calls(kernel.op)} - {None}:
        pytest.skip(str(missing))
    assert wanted, f"no sample of {kernel.op} is accepted by {kernel.name}"
    cache = tmp_path_factory.getbasetemp() / "cubins"  # shared by kernels of the same launches
    built, failed = build_each(wanted, cache, arch)
    assert not failed, "\n".join(f"{wanted[s][1]}: {error}" for s, error in failed.items())
    spills: dict[Source, int] = {}
    for source, (binary, _) in built.items():
        what = f"{source.function} {wanted[source][1]}"
        threads = binary.block
        file = -(-binary.registers // 8) * 8 * threads  # given out by eights
        assert 0 < file <= REGISTERS, f"{what}: {binary.registers} registers, {threads} threads"
        assert binary.shared <= SHARED, f"{what}: {binary.shared} bytes of shared memory"
        assert binary.pdl, f"{what} does not wait for its predecessor"
        assert binary.scratch == 0, f"{what}: {binary.scratch} bytes of global scratch"
        if binary.stack:
            spills[source] = binary.stack
    print(
        f"{kernel.name}: {len(built)} cubins, {len(spills)} spill", max(spills.values(), default=0)
    )
    # float32 activations, served to be compared, take twice the registers.
    for call, config in picked:
        if config == kernel.default(call) and "bfloat16" in call.dtypes.values():
            for source in sources(kernel, call, config):
                assert source not in spills, f"{source}: spills {spills[source]} bytes by default"
