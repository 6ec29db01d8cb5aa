"""Registration of the CUDA attention kernels over paged keys and values, plain and latent.

Sequences of few new tokens go through the split kernel (keys shared out evenly over the whole
batch), longer chunks through the tile kernel (flash attention). A decode bucket has the former
only, an encoder the latter only, a mixed bucket both, each skipping what is the other's.

Imported by kernels/cuda/register.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from kernels.cuda.kernel import (
    SIZES,
    TYPES,
    Config,
    CudaKernel,
    counters,
    launch,
    pointer,
    register,
    workspace,
)
from kernels.cuda.kv_write import kv_pointer, kv_stride, refuse_pages
from kernels.kernel import CallShape
from kernels.launch import COUNTERS_BYTES, Constant, Launch, Slot

PAGE_SIZE = 16  # tokens; PAGE_TOKENS in code/attention.py
MAX_HEAD_DIM = 256
MAX_LATENT = 512
MULTIPROCESSORS = 132  # of H100 and H200 SXM
REGISTERS = 1 << 16
MOST_REGISTERS = 255  # of a thread
SHARED = 227 << 10  # bytes of dynamic shared memory a program can have


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig(Config):
    """`rows` (token, head) rows and `keys` keys of a tile."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig(TileConfig):
    """`programs` per multiprocessor. `balanced`: equal shares of the live batch's keys for all
    programs; else a fixed number of programs per sequence and KV head (to compare with)."""

    programs: int
    balanced: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedConfig(Config):
    split: SplitConfig
    tile: TileConfig


AnyConfig = TypeVar("AnyConfig", bound=TileConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Sizes of a call: `dim` of values, `rest` that keys have beyond it. A latent call has one KV
    head, whose values are the first `dim` columns of its keys."""

    heads: int
    kv_heads: int
    dim: int
    rest: int
    seqs: int
    tokens: int
    columns: int
    kv: str  # element type of the pages
    page: int  # elements between pages
    values: int  # elements from the layer's keys to its values; 0: they are within the keys
    wide: bool  # the product is of float32

    @property
    def fp8(self) -> bool:
        return SIZES[self.kv] == 1

    @property
    def pad(self) -> int:
        return max(16, _power(self.dim))

    @property
    def rest_pad(self) -> int:
        return max(16, _power(self.rest)) if self.rest else 0

    def packing(self, rows: int) -> tuple[int, int, int]:
        """Heads of a tile, tiles of a group, tokens of a tile."""
        group = self.heads // self.kv_heads
        tiles = -(-group // rows)
        heads = -(-group // tiles)
        return heads, tiles, rows // heads if tiles == 1 else 1


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _shape(call: CallShape) -> _Shape:
    attrs, shapes = call.attrs, call.shapes
    latent = "latent" in attrs
    kv = kv_pointer(attrs).type
    return _Shape(
        heads=attrs["heads"],
        kv_heads=1 if latent else attrs["kv_heads"],
        dim=attrs["latent"] if latent else attrs["v_head_dim"],
        rest=attrs["rotary"] if latent else attrs["head_dim"] - attrs["v_head_dim"],
        seqs=shapes["seq_len"][0],
        tokens=shapes["q"][0],
        columns=shapes["pages"][1],
        kv=kv,
        page=kv_stride(attrs),
        values=0 if latent else attrs["kv_heads"] * PAGE_SIZE * attrs["head_dim"],
        wide="fp32" in (kv, TYPES[call.dtypes["q"]]),
    )


def _accepts(served: str) -> Callable[[CallShape], str | None]:
    """`served`: buckets of kind decode or mixed; or whole: attention both ways, of whole
    sequences."""

    def accepts(call: CallShape) -> str | None:
        attrs = call.attrs
        if reason := refuse_pages(attrs):
            return reason
        kind = call.kind if attrs.get("causal", True) else "whole"
        if kind != served:
            return f"the call is for {kind} sequences, this kernel serves {served} ones"
        if attrs["page_size"] != PAGE_SIZE:
            return f"page_size {attrs['page_size']} is not {PAGE_SIZE}"
        name, most = ("latent", MAX_LATENT) if "latent" in attrs else ("head_dim", MAX_HEAD_DIM)
        if attrs[name] % 16 or not 16 <= attrs[name] <= most:
            return f"{name} {attrs[name]} is not a multiple of 16 in 16..{most}"
        values = attrs.get("v_head_dim", 16)
        if values % 16 or not 16 <= values <= attrs[name]:
            return f"v_head_dim {values} is not a multiple of 16 in 16..{attrs[name]} ({name})"
        if attrs["heads"] % attrs.get("kv_heads", 1):
            return (
                f"{attrs['heads']} heads cannot be shared out evenly over {attrs['kv_heads']} kv "
                "heads"
            )
        return None

    return accepts


def _arguments(call: CallShape, config: TileConfig) -> dict[str, Slot | Constant]:
    """What both kernels take."""
    shape, attrs = _shape(call), call.attrs
    heads, tiles, tokens = shape.packing(config.rows)
    return {
        "live_ptr": pointer(call, "live"),
        "q_ptr": pointer(call, "q"),
        "kv_ptr": kv_pointer(attrs),
        "seq_start_ptr": pointer(call, "seq_start"),
        "seq_len_ptr": pointer(call, "seq_len"),
        "pages_ptr": pointer(call, "pages"),
        "sinks_ptr": pointer(call, "sinks"),
        "alibi_ptr": pointer(call, "alibi"),
        "out_ptr": pointer(call, "out"),
        "amax_ptr": pointer(call, "out_amax"),
        "SEQS_PAD": _power(shape.seqs),
        "COLUMNS": shape.columns,
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "TILE_HEADS": heads,
        "HEAD_TILES": tiles,
        "TOKENS": tokens,
        "DIM": shape.dim,
        "DIM_PAD": shape.pad,
        "REST": shape.rest,
        "REST_PAD": shape.rest_pad,
        "PAGE": shape.page,
        "VALUES": shape.values,
        "SCALE": float(attrs["scale"]),
        "WINDOW": attrs.get("window", 0),
        "SOFTCAP": float(attrs.get("softcap", 0.0)),
        "LOGN": attrs.get("logn", 0),
        "ROWS": config.rows,
        "KEYS": config.keys,
    }


def _launch(
    name: str,
    programs: int,
    config: TileConfig,
    arguments: dict[str, Slot | Constant],
    registers: int = 0,
) -> Launch:
    return launch(
        f"attention.{name}",
        (programs, 1, 1),
        warps=config.warps,
        stages=config.stages,
        ctas=1,
        registers=registers,
        **arguments,
    )


# -- split -----------------------------------------------------------------------------------------


def _short(call: CallShape, config: SplitConfig) -> int:
    """New tokens up to which a sequence goes through the split kernel."""
    return 1 if call.kind == "decode" else _shape(call).packing(config.rows)[2]


def _programs(call: CallShape, config: SplitConfig) -> tuple[int, int]:
    """Programs of the grid, and programs of a tile where they are shared out statically."""
    shape = _shape(call)
    tiles = shape.seqs * shape.kv_heads * shape.packing(config.rows)[1]
    blocks = -(-shape.columns * PAGE_SIZE // config.keys)
    most = MULTIPROCESSORS * config.programs
    if config.balanced:
        return min(most, tiles * blocks), 0
    splits = min(-(-most // tiles), blocks)
    return tiles * splits, splits


def _part_rows(call: CallShape, config: SplitConfig) -> int:
    heads = _shape(call).packing(config.rows)[0]
    return min(config.rows, _power(heads * _short(call, config)))


def _split(call: CallShape, config: SplitConfig) -> Launch:
    programs, splits = _programs(call, config)
    return _launch(
        "split_kernel",
        programs,
        config,
        {
            **_arguments(call, config),
            "partial_ptr": workspace("fp32"),
            "counters_ptr": counters(),
            "TOKENS": _short(call, config),
            "DECODE": call.kind == "decode",
            "PART_ROWS": _part_rows(call, config),
            "PROGRAMS": programs,
            "SPLITS": splits,
        },
        # what lets that many programs stand on a multiprocessor, and no less
        registers=_registers(config),
    )


def _split_workspace(call: CallShape, config: SplitConfig) -> int:
    """Two parts per program: weighted values, largest score and sum of weights of every row."""
    rows = _part_rows(call, config)
    return _programs(call, config)[0] * 2 * rows * (_shape(call).dim + 2) * 4


def _split_valid(call: CallShape, config: SplitConfig) -> str | None:
    programs, _ = _programs(call, config)
    if programs * 4 > COUNTERS_BYTES:
        return f"{programs} programs need more counters than {COUNTERS_BYTES} bytes hold"
    return _valid(call, config)


def _split_default(call: CallShape) -> SplitConfig:
    """In decode buckets as few rows as hold the heads of a group; in mixed ones room for short
    chunks. Two programs of 100 KB fit a multiprocessor and keep more keys and values on their way
    than its share of the bandwidth needs (about 30 KB); where keys are wider than values, with a
    stage less, or one program does. Wide heads leave registers for 32 rows, of fp8, which is
    converted in registers, for 16. Largest values of the results take registers, too: with 64 rows
    of 128 columns one program of eight warps stands for two of four."""
    shape = _shape(call)
    heads = shape.heads // shape.kv_heads
    narrow = shape.wide or shape.pad > 256
    most = 64 if shape.pad <= 128 and not shape.wide else 32
    if shape.fp8 and shape.pad > 256:
        most = 16
    rows = min(most, max(16, _power(heads)))
    if call.kind != "decode" and not narrow:
        rows = most
    large = shape.pad > 128 or (rows == 64 and shape.pad == 128 and "out_amax" in call.shapes)
    config = _fitting(
        call,
        SplitConfig(
            rows=rows,
            keys=32 if narrow else 64,
            warps=8 if large else 4,
            stages=3 if rows == 64 or shape.pad > 256 else 4,
            programs=1 if large else 2,
        ),
    )
    for choice in (config, replace(config, stages=min(config.stages, 3))):
        if choice.programs * _shared(call, choice) <= SHARED:
            return choice
    return replace(config, programs=1)


def _split_space(call: CallShape) -> Iterable[SplitConfig]:
    shape = _shape(call)
    least = min(64, max(16, _power(shape.heads // shape.kv_heads)))
    sizes = [r for r in (16, 32, 64) if r >= least]
    if call.kind == "decode":
        # Warp groups (64 rows) read values by wide loads, where smaller tiles gather fp8 by bytes.
        sizes = sorted({least, 64}) if shape.fp8 else [least]
    for rows, keys, warps, stages in product(sizes, (32, 64, 128), (4, 8), (3, 4, 6)):
        for programs in (1, 2, 3):
            yield SplitConfig(rows=rows, keys=keys, warps=warps, stages=stages, programs=programs)


# -- tiles -----------------------------------------------------------------------------------------


def _tile(call: CallShape, config: TileConfig, shortest: int) -> Launch:
    """Sequences of at least `shortest` new tokens."""
    shape = _shape(call)
    _, tiles, tokens = shape.packing(config.rows)
    # Every sequence may end in a tile that is not full.
    most = shape.tokens // tokens + min(shape.seqs, shape.tokens // shortest)
    return _launch(
        "tile_kernel",
        most * shape.kv_heads * tiles,
        config,
        {
            **_arguments(call, config),
            "SHORTEST": shortest,
            "CAUSAL": call.attrs.get("causal", True),
        },
    )


def _shared(call: CallShape, config: TileConfig) -> int:
    """Bytes of shared memory: queries, keys and values in the pipeline, weights. Products of
    float32 take high and low parts of their operands. The product of warp groups (from 64 rows) has
    its weights in registers and reads keys from shared memory: those in the pipeline, while the
    next block is fetched, which takes a buffer more, or, where their type is another or they have
    two parts, what they are converted to."""
    shape = _shape(call)
    size, parts = (4, 2) if shape.wide else (2, 1)
    columns = shape.pad + shape.rest_pad
    block = config.keys * (columns + (shape.pad if shape.values else 0)) * SIZES[shape.kv]
    queries = config.rows * columns * size * parts
    if config.rows < 64:
        operand, buffers = config.rows * config.keys * size * parts, config.stages - 1
    elif SIZES[shape.kv] < size or shape.wide:
        operand, buffers = config.keys * columns * size * parts, config.stages - 1
    else:
        operand, buffers = 0, config.stages
    return queries + buffers * block + operand


def _registers(config: TileConfig) -> int:
    """Registers a thread may have, where as many programs as wanted stand on a multiprocessor."""
    programs = config.programs if isinstance(config, SplitConfig) else 1
    return min(MOST_REGISTERS, REGISTERS // (programs * config.warps * 32) // 8 * 8)


def _held(call: CallShape, config: TileConfig) -> int:
    """Registers of a thread that the products of warp groups hold at once, and that cannot be
    spilled: sums of both, weights as the second one takes them, a block of keys where it is
    converted. Smaller tiles multiply piece by piece."""
    if config.rows < 64:
        return 0
    shape = _shape(call)
    wide = 4 if shape.wide else 2
    scores = config.rows * config.keys * (4 + wide)
    values = config.rows * shape.pad * 4
    narrow = SIZES[shape.kv] < wide
    converted = config.keys * (shape.pad + shape.rest_pad) * wide if narrow else 0
    return (scores + values + converted) // (4 * 32 * config.warps)


def _valid(call: CallShape, config: TileConfig) -> str | None:
    if (shared := _shared(call, config)) > SHARED:
        return f"{shared} bytes of shared memory exceed {SHARED}"
    if (held := _held(call, config)) >= (most := _registers(config)):
        return f"{held} registers a thread for the products alone leave none of {most} for the rest"
    return None


def _fitting(call: CallShape, config: AnyConfig) -> AnyConfig:
    """The configuration with fewer keys in flight, if it must."""
    while _shared(call, config) > SHARED:
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        else:
            config = replace(config, keys=config.keys // 2)
    return config


def _tile_default(call: CallShape) -> TileConfig:
    """Two warp groups of 64 rows each. float32 has no product as fast and takes twice the
    registers, as wide heads do. Heads of 128 take 128 keys: the queries' product reads shared
    memory at three quarters of its rate (with 64 keys at all of it), and rescaling, reductions and
    barriers serve twice the keys. Narrower heads leave room for two programs with 64."""
    shape = _shape(call)
    rows, keys, warps, stages = 128, 64, 8, 3
    if shape.wide or shape.pad > 256:
        rows, keys, warps = 32, 32, 8 if shape.pad > 64 else 4
    elif shape.pad > 128:
        rows = 64
    elif shape.pad == 128 and not shape.rest:
        keys, stages = 128, 3 if shape.fp8 else 2  # 64 KB on their way
    if shape.fp8 and shape.pad > 128:  # conversion takes registers, as the edge of a window does
        keys = 32
        if shape.pad > 256 or call.attrs.get("window"):
            rows = 16 if shape.pad > 256 else 32
    return _fitting(call, TileConfig(rows=rows, keys=keys, warps=warps, stages=stages))


def _tile_space(call: CallShape) -> Iterable[TileConfig]:
    for rows, keys, stages in product((64, 128), (32, 64, 128), (2, 3, 4)):
        for warps in (4, 8):
            yield TileConfig(rows=rows, keys=keys, warps=warps, stages=stages)


# -- kernels ---------------------------------------------------------------------------------------


def _mixed_default(call: CallShape) -> MixedConfig:
    return MixedConfig(split=_split_default(call), tile=_tile_default(call))


def _mixed_space(call: CallShape) -> Iterable[MixedConfig]:
    """One of the two launches at a time: they do not share work."""
    best = _mixed_default(call)
    for split in _split_space(call):
        yield replace(best, split=split)
    for tile in _tile_space(call):
        yield replace(best, tile=tile)


def _mixed(call: CallShape, config: MixedConfig) -> tuple[Launch, ...]:
    longer = _short(call, config.split) + 1
    split = _split(call, config.split)
    if longer > _shape(call).tokens:  # the bucket holds no longer chunk
        return (split,)
    return split, _tile(call, config.tile, longer)


for _op in ("attention", "mla_attention"):
    register(
        CudaKernel(
            name=f"{_op}_decode",
            op=_op,
            accepts=_accepts("decode"),
            space=_split_space,
            default=_split_default,
            valid=_split_valid,
            launches=lambda call, config: (_split(call, config),),
            workspace=_split_workspace,
        )
    )
    register(
        CudaKernel(
            name=f"{_op}_mixed",
            op=_op,
            accepts=_accepts("mixed"),
            space=_mixed_space,
            default=_mixed_default,
            valid=lambda call, config: (
                _split_valid(call, config.split) or _valid(call, config.tile)
            ),
            launches=_mixed,
            workspace=lambda call, config: _split_workspace(call, config.split),
        )
    )

register(
    CudaKernel(
        name="attention_whole",
        op="attention",
        accepts=_accepts("whole"),
        space=_tile_space,
        default=_tile_default,
        valid=_valid,
        launches=lambda call, config: (_tile(call, config, 1),),
    )
)
