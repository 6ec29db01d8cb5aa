"""What the row-wise CUDA kernels share: how rows are shared out over programs.

A row-wise kernel is limited by bandwidth when there are many rows and by latency when there are
few. So a row is cut into blocks of columns, one program each, and a thread moves 16 bytes or more
at a time: with one row the blocks spread over the processors, with many rows there are programs
enough either way.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cuda.kernel import Config
from kernels.kernel import CallShape

PROCESSORS = 132  # of an H100 or H200
AMAX_WIDTH = 64  # columns of a part of a row whose largest number is kept (WIDTH of the contract)
ACTIVATION_TYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowConfig(Config):
    """`block`: columns of a row that one program takes."""

    block: int
    warps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig(Config):
    """`rows`: rows (or heads of rows) that one program takes, each whole."""

    rows: int
    warps: int


def power(n: int) -> int:
    """The smallest power of two that is at least n: Triton's tiles have such sizes."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def refuse_types(call: CallShape, *names: str) -> str | None:
    """Why the element types of these arguments cannot be served, or None."""
    for name in names:
        if call.dtypes.get(name, "float32") not in ACTIVATION_TYPES:
            return f"{name} is {call.dtypes[name]}: supported are {', '.join(ACTIVATION_TYPES)}"
    return None


def row_space(call: CallShape) -> list[RowConfig]:
    return [RowConfig(block=b, warps=w) for b in (512, 1024, 2048, 4096) for w in (2, 4, 8)]


def row_default(width: int) -> RowConfig:
    """1024 columns on 4 warps are 16 bytes per thread in bfloat16."""
    block = min(1024, max(power(width), 64))
    return RowConfig(block=block, warps=max(1, block // 256))


def row_grid(rows: int, width: int, config: RowConfig) -> tuple[int, int, int]:
    """Programs go through a row's blocks first."""
    return (rows * cdiv(width, config.block), 1, 1)


def tile_space(call: CallShape) -> list[TileConfig]:
    return [TileConfig(rows=r, warps=w) for r in (1, 2, 4, 8, 16) for w in (1, 2, 4, 8, 16)]


def tile_valid(width: int, config: TileConfig) -> str | None:
    """A program keeps its tile in registers as float32, in several copies."""
    each = power(width) * config.rows / (32 * config.warps)
    if each > 32:
        return f"{config.rows} rows of {width} on {config.warps} warps: {each:g} values per thread"
    return None


def tile_default(rows: int, width: int) -> TileConfig:
    """About 8 values per thread; several narrow rows share a program once every processor has
    one."""
    size = power(width)
    fit = max(1, 1024 // size)
    while fit > 1 and rows // fit < PROCESSORS:
        fit //= 2
    warps = min(16, max(1, fit * size // 256))
    return TileConfig(rows=fit, warps=warps)
