"""Launches: what a kernel does for one call, on any target, as data.

A kernel turns a call into one or more `Launch`es. A launch names its code and binds every parameter
to a slot: an address in an arena, a number, or a tensor map (TMA descriptor). `compiler.record`
writes launches into plans; tests bind the same launches to arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Bytes at the start of every device work arena that are zero between launches: semaphores of
# kernels whose last program finishes the work of all (split-K, split-KV). A kernel leaves them
# zero.
COUNTERS = "counters"
COUNTERS_BYTES = 1 << 17
WORKSPACE = "workspace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """Address of an argument of the call, plus `offset` bytes; zero when the argument is absent.

    `arg` is an argument of the op, `workspace` (the call's scratch) or `counters`; `field` a stored
    field of a matrix weight (`data`, `scale`). `type` is the element type in Triton's spelling
    (`bf16`, `fp32`, `i32`, `i64`, `i8`, `u8`, `fp16`, `fp8e4nv`), empty on CPU, where every
    parameter is eight bytes.
    """

    arg: str
    field: str = ""
    offset: int = 0
    type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A scalar parameter. `type`: i32 | i64 | fp32 | fp64."""

    type: str
    value: int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A tensor map over an argument: `shape` and `strides` in elements, outermost axis first, the
    last stride 1; `block` is the declared tile. The map itself is encoded at load from the binary's
    metadata (swizzle, box) and the address."""

    arg: str
    type: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    field: str = ""
    offset: int = 0


Slot = Pointer | Number | Descriptor
Constant = int | float | bool | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Device code and everything its binary depends on: the key of the binary cache.

    `function` is `<module>.<name>` under kernels.cuda.code. `signature` gives the type of every
    parameter that is not a constant (`*bf16`, `i32`, `tensordesc<bf16[128, 64]>`), `constants` the
    compile-time ones; together they cover the function's parameters. Pointers are multiples of 16.
    """

    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    warps: int = 4
    stages: int = 3
    ctas: int = 1  # thread blocks of a cluster
    registers: int = 0  # upper limit per thread, 0: the compiler's choice
    language: str = "triton"  # triton | cuda (C++ through nvcc)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch. On CPU `source` is None and `entry` a symbol of the native library; on a device
    `entry` is empty (the binary knows its name) and `slots` go by the function's parameter names.
    `grid` counts programs (before multiplying x by the cluster size)."""

    slots: Mapping[str, Slot]
    entry: str = ""
    source: Source | None = None
    grid: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a binary in ABI order, as read back from the binary. `kind`: pointer |
    number | tensormap | shape | stride (the integers that follow a tensor map) | scratch | null;
    `name` the function's parameter; `axis` of a shape or stride."""

    name: str
    kind: str
    offset: int
    size: int
    axis: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MapRecipe:
    """How the code expects a tensor map encoded: the driver's element type and swizzle codes, bytes
    per element and the box (a tile may take several boxes)."""

    element_type: int
    element_size: int
    swizzle: int
    box: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """A built cubin and what a loader must know of it. `shared`: dynamic shared memory, bytes;
    `scratch`: bytes of global scratch per program (0: none); `stack`: bytes per thread (spills);
    `elf_abi` 7: CUDA 12 drivers and newer, 8: CUDA 13."""

    sha256: str
    size: int
    entry: str
    block: int
    cluster: int
    shared: int
    scratch: int
    scratch_align: int
    parameters: tuple[Parameter, ...]
    maps: Mapping[str, MapRecipe] = field(default_factory=dict)
    registers: int = 0
    stack: int = 0
    elf_abi: int = 7
    pdl: bool = False  # waits for its predecessor itself (griddepcontrol.wait)
    versions: Mapping[str, str] = field(default_factory=dict)
