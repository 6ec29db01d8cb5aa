"""Kernels on a GPU outside any artifact: memory, launches, and what a launch takes.

Comes in: cubins with what a manifest would say of them, and calls. Goes out: memory as the calls
left it, and seconds by replay of a graph. For tuning, benchmarks and tests on a device; a
`Launcher` lives in one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from runtime.artifact import CudaBinary, TensorMap
from runtime.device.cuda import open_driver
from runtime.device.driver import find_gpu
from runtime.device.gpu_code import Code, Function
from runtime.device.gpu_graph import (
    MAP_BYTES,
    Arguments,
    Axes,
    Graph,
    GraphNode,
    encode_map,
    map_table,
)
from runtime.device.gpu_memory import GpuArena, make_context, make_event, make_stream

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One launch. `grid` in thread blocks; `arguments`: the bytes of every parameter in ABI order
    (a tensor map has 128, everything else up to 8); `programmatic`: it may start before the call
    before it has ended (it waits itself)."""

    function: Function
    grid: Axes
    arguments: tuple[bytes, ...]
    programmatic: bool = True


class Launcher:
    """`with Launcher(gpu=0) as launcher:`; everything it made is gone afterwards."""

    def __init__(self, gpu: int = 0) -> None:
        self._stack = ExitStack()
        self._images: dict[str, bytes] = {}
        try:
            self._driver = open_driver()
            self.gpu = find_gpu(self._driver, gpu)
            make_context(self._driver, self.gpu, self._stack)
            self._code = Code(self._driver, self._images.__getitem__)
            self._stack.callback(self._code.close)
            self._stream = make_stream(self._driver, self._stack)
            self._begun, self._ended = (
                make_event(self._driver, self._stack, timing=True) for _ in range(2)
            )
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    # --- memory ---------------------------------------------------------------------------------

    def free_memory(self) -> int:
        """Bytes of device memory that nobody has."""
        return int(self._driver("cuMemGetInfo")[0])

    def allocate(self, size: int) -> int:
        """Address of `size` bytes (in units of megabytes: share them out)."""
        return GpuArena(self._driver, self.gpu, size, self._stack).address

    def write(self, address: int, data: npt.NDArray[np.generic]) -> None:
        flat = np.ascontiguousarray(data)
        if flat.nbytes:
            self._driver("cuMemcpyHtoD", address, flat.ctypes.data, flat.nbytes)

    def read(self, address: int, size: int) -> Bytes:
        out = np.empty(size, np.uint8)
        if size:
            self._driver("cuMemcpyDtoH", out.ctypes.data, address, size)
        return out

    def fill(self, address: int, size: int, value: int = 0) -> None:
        if size:
            self._driver("cuMemsetD8Async", address, value, size, self._stream)
            self._driver("cuStreamSynchronize", self._stream)

    # --- code -----------------------------------------------------------------------------------

    def load(self, image: bytes, binary: CudaBinary) -> Function:
        """A kernel of a cubin; each (path, entry) is loaded once."""
        self._images[binary.path] = image
        return self._code.function(binary)

    def map(self, map: TensorMap, base: int) -> bytes:
        """The argument for a tensor map over memory at `base` + its offset."""
        row = map_table(1)[0]
        encode_map(self._driver, map, base + map.offset, row)
        return row.tobytes()

    def graph(self, calls: Sequence[Call]) -> Graph:
        """The calls as a chain. The caller closes it before the launcher."""
        flat = [argument for call in calls for argument in call.arguments]
        values = np.zeros(len(flat), np.uint64)
        is_map = np.array([len(argument) == MAP_BYTES for argument in flat], np.bool_)
        maps = map_table(int(is_map.sum()))
        row = 0
        for index, argument in enumerate(flat):
            if is_map[index]:
                maps[row] = np.frombuffer(argument, np.uint8)
                row += 1
            else:
                values[index] = int.from_bytes(argument, "little")
        arguments = Arguments(values, maps)
        arguments.use_maps(is_map, np.arange(row))
        nodes, first = [], 0
        for call in calls:
            binary = call.function.binary
            if [len(a) for a in call.arguments] != [p.size for p in binary.parameters]:
                raise ValueError(
                    f"kernel {binary.entry} takes parameters of "
                    f"{[p.size for p in binary.parameters]} bytes, got "
                    f"{[len(a) for a in call.arguments]}"
                )
            nodes.append(
                GraphNode(
                    function=call.function,
                    grid=call.grid,
                    block=(binary.block, 1, 1),
                    cluster=(binary.cluster, 1, 1),
                    shared=binary.shared,
                    arguments=arguments.address(first),
                    programmatic=call.programmatic,
                )
            )
            first += len(call.arguments)
        return Graph(self._driver, nodes)

    # --- running --------------------------------------------------------------------------------

    def run(self, graph: Graph) -> None:
        """Launches it and waits until it has ended."""
        graph.launch(self._stream)
        self._driver("cuStreamSynchronize", self._stream)

    def seconds(self, graph: Graph, rounds: int = 20, warmup: int = 3) -> list[float]:
        """Device time of each of `rounds` replays. For a kernel of microseconds give a graph of
        many calls on rotating buffers, so that nothing is found in the caches, and divide."""
        for _ in range(warmup):
            graph.launch(self._stream)
        out: list[float] = []
        for _ in range(rounds):
            self._driver("cuEventRecord", self._begun, self._stream)
            graph.launch(self._stream)
            self._driver("cuEventRecord", self._ended, self._stream)
            self._driver("cuEventSynchronize", self._ended)
            out.append(self._driver("cuEventElapsedTime", self._begun, self._ended) / 1e3)
        return out

    @property
    def driver(self) -> Any:
        """For questions about the driver itself."""
        return self._driver
