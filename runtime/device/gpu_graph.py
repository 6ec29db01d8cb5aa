"""Launch plans as CUDA graphs: a chain of kernel nodes, instantiated once, launched every step.

Comes in: nodes whose arguments lie in host memory. Goes out: a `Graph`. `PlanGraph` makes one of a
stored plan: parameters relocated, tensor maps encoded. Called by the CUDA session and the launcher.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.artifact import (
    ARENAS,
    FLAG_PROGRAMMATIC,
    PARAM_TENSORMAP,
    Artifact,
    LaunchPlan,
    TensorMap,
)
from runtime.device.driver import Driver
from runtime.device.gpu_code import Code, Function
from runtime.device.staging import relocate
from runtime.errors import DamagedArtifact

MAP_BYTES = 128  # a CUtensorMap
MAP_ALIGN = 64

Axes = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphNode:
    """`arguments`: address of an array of pointers to the parameters in ABI order; read while the
    node is added, not later. `programmatic`: it may start before the node before it has ended."""

    function: Function
    grid: Axes
    block: Axes
    cluster: Axes
    shared: int
    arguments: int
    programmatic: bool


class Graph:
    """An executable chain of kernels. Not safe to launch from two threads at once."""

    def __init__(self, driver: Driver, nodes: Iterable[GraphNode]) -> None:
        self._driver = driver
        self._exec: Any = None
        graph = driver("cuGraphCreate", 0)
        try:
            add_chain(driver, graph, nodes)
            self._exec = driver("cuGraphInstantiate", graph, 0)
        finally:
            driver("cuGraphDestroy", graph)

    def upload(self, stream: Any) -> None:
        """What the first launch would do otherwise."""
        self._driver("cuGraphUpload", self._exec, stream)

    def launch(self, stream: Any) -> None:
        self._driver("cuGraphLaunch", self._exec, stream)

    def close(self) -> None:
        if self._exec is not None:
            self._driver("cuGraphExecDestroy", self._exec)
            self._exec = None


def add_chain(driver: Driver, graph: Any, nodes: Iterable[GraphNode]) -> None:
    api = driver.api
    full, programmatic = [api.CUgraphEdgeData()], [api.CUgraphEdgeData()]
    programmatic[0].type = api.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    programmatic[0].from_port = api.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
    # One struct for all nodes: the driver copies it, and the parameters it points to.
    params = api.CUgraphNodeParams()
    params.type = api.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
    kernel = params.kernel
    last: list[Any] = []
    for node in nodes:
        kernel.func = node.function.handle
        kernel.gridDimX, kernel.gridDimY, kernel.gridDimZ = node.grid
        kernel.blockDimX, kernel.blockDimY, kernel.blockDimZ = node.block
        kernel.sharedMemBytes = node.shared
        kernel.kernelParams = node.arguments
        edge = (programmatic if node.programmatic else full) if last else []
        added = driver("cuGraphAddNode", graph, last, edge, len(last), params)
        if node.cluster != (1, 1, 1):
            set_cluster(driver, added, node.cluster)
        last = [added]


def set_cluster(driver: Driver, node: Any, cluster: Axes) -> None:
    value = driver.api.CUkernelNodeAttrValue()
    value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = cluster
    kind = driver.api.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    driver("cuGraphKernelNodeSetAttribute", node, kind, value)


class Arguments:
    """Parameters of kernels in host memory, and the pointer arrays a launch takes."""

    def __init__(self, values: npt.NDArray[np.uint64], maps: npt.NDArray[np.uint8]) -> None:
        """`values[i]`: parameter i in its low bytes; `maps`: [n, 128] bytes, aligned."""
        self._values, self._maps = values, maps
        at = np.arange(len(values), dtype=np.uint64) * np.uint64(8)
        self._pointers = at + np.uint64(values.ctypes.data)

    def use_maps(self, where: npt.NDArray[np.bool_], index: npt.NDArray[np.integer]) -> None:
        """Parameters `where` are tensor maps, `index` says which."""
        base = np.uint64(self._maps.ctypes.data)
        self._pointers[where] = base + index.astype(np.uint64) * np.uint64(MAP_BYTES)

    def address(self, first: int) -> int:
        """Of the pointer array that begins with parameter `first`."""
        return int(self._pointers.ctypes.data) + 8 * first


def map_table(count: int) -> npt.NDArray[np.uint8]:
    """[count, 128] zero bytes, aligned as the driver wants tensor maps."""
    raw = np.zeros(count * MAP_BYTES + MAP_ALIGN, np.uint8)
    start = -raw.ctypes.data % MAP_ALIGN
    return raw[start : start + count * MAP_BYTES].reshape(count, MAP_BYTES)


def encode_map(driver: Driver, map: TensorMap, address: int, row: npt.NDArray[np.uint8]) -> None:
    """Writes the tensor map over memory at `address` into an aligned row, axes as Triton encodes
    them. Not by the bindings: the map they return is not aligned, which the driver may refuse."""
    api, axes = driver.api, len(map.shape)
    # The driver wants the innermost axis first, strides in bytes and without the innermost.
    wide, narrow = ctypes.c_uint64 * axes, ctypes.c_uint32 * axes
    driver.native(
        "cuTensorMapEncodeTiled",
        ctypes.c_void_p(row.ctypes.data),
        map.element_type,
        axes,
        ctypes.c_void_p(address),
        wide(*reversed(map.shape)),
        wide(*(n * map.element_size for n in reversed(map.strides[:-1]))),
        narrow(*reversed(map.box)),
        narrow(*[1] * axes),
        int(api.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        map.swizzle,
        int(api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B),
        int(api.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )


def plan_graph(
    driver: Driver,
    artifact: Artifact,
    plan: LaunchPlan,
    code: Code,
    bases: Sequence[int],
    sizes: Sequence[int],
    only: Sequence[int] | None = None,
) -> Graph:
    """The stored plan on arenas that lie at `bases`; `only` some of its nodes, to measure them."""
    arguments = Arguments(
        relocate(artifact, plan, bases, sizes, maps=True),
        plan_maps(driver, artifact, plan, bases, sizes),
    )
    where = plan.params["kind"] == PARAM_TENSORMAP
    arguments.use_maps(where, plan.params["aux"][where])
    functions = plan_functions(artifact, plan, code)
    nodes = plan.nodes if only is None else plan.nodes[list(only)]
    columns = (nodes[name].tolist() for name in ("kernel", "first_param", "grid", "block"))
    rest = (nodes[name].tolist() for name in ("cluster", "shared", "flags"))
    return Graph(
        driver,
        (
            GraphNode(
                function=functions[kernel],
                grid=tuple(grid),
                block=tuple(block),
                cluster=tuple(max(n, 1) for n in cluster),
                shared=shared,
                arguments=arguments.address(first),
                programmatic=bool(flags & FLAG_PROGRAMMATIC),
            )
            for kernel, first, grid, block, cluster, shared, flags in zip(
                *columns, *rest, strict=True
            )
        ),
    )


def plan_maps(
    driver: Driver,
    artifact: Artifact,
    plan: LaunchPlan,
    bases: Sequence[int],
    sizes: Sequence[int],
) -> npt.NDArray[np.uint8]:
    maps = plan.header.tensormaps
    table = map_table(len(maps))
    for row, map in zip(table, maps, strict=True):
        last = sum((n - 1) * stride for n, stride in zip(map.shape, map.strides, strict=True))
        end = map.offset + (last + 1) * map.element_size
        if end > sizes[map.arena]:
            raise DamagedArtifact(
                f"artifact {artifact.path}, plan {plan.header.bucket.name}: expected a tensor map "
                f"inside the {sizes[map.arena]} bytes of {ARENAS[map.arena]}, found one to {end}; "
                "compile it again"
            )
        encode_map(driver, map, bases[map.arena] + map.offset, row)
    return table


def plan_functions(artifact: Artifact, plan: LaunchPlan, code: Code) -> list[Function]:
    """A function per entry of the plan's kernel table; every node has the parameters it takes."""
    where = f"artifact {artifact.path}, plan {plan.header.bucket.name}"
    table = {(k.path, k.entry): k for k in artifact.manifest.kernels}
    functions: list[Function] = []
    for index, ref in enumerate(plan.header.kernels):
        binary = table.get((ref.file, ref.entry))
        if binary is None:
            raise DamagedArtifact(
                f"{where}: expected kernel {ref.entry} of {ref.file} in the manifest, found none; "
                "compile it again"
            )
        functions.append(code.function(binary))
        wanted = [p.size for p in binary.parameters]
        for node in plan.nodes[plan.nodes["kernel"] == index]:
            first, number = int(node["first_param"]), int(node["params"])
            given = plan.params[first : first + number]["size"].tolist()
            if given != wanted or int(node["shared"]) > binary.shared:
                raise DamagedArtifact(
                    f"{where}: kernel {ref.entry} takes parameters of {wanted} bytes and "
                    f"{binary.shared} bytes of shared memory, found {given} and "
                    f"{int(node['shared'])}; compile it again"
                )
    return functions
