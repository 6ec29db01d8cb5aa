"""Registration of the CUDA kernels of `linear_rope_kv`: the QKV projection with everything up to
the cache. Imported by kernels/cuda/register.py.

One launch where the heads fit: the products of `linear`, in tiles of whole heads, whose epilogue
finds a head's dims in registers (`linear_rope_kv_tiles`); with one row, tiles narrower than a head,
whose last program finishes the head (`linear_rope_kv_vector`). Then every kernel of `linear`
followed by `rope_kv`, through scratch, for the heads that do not fit and for the tuner to compare:
CUTLASS and other products of many rows come in here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kernels.cuda.kernel import (
    SIZES,
    TYPES,
    Config,
    CudaKernel,
    counters,
    register,
    workspace,
)
from kernels.cuda.kv_write import (
    ROPE_KV,
    head_blocks,
    heads_arguments,
    rotary_dims,
)
from kernels.cuda.linear import TILES, VECTOR, tile_launches, vector_launch
from kernels.cuda.product import (
    TileConfig,
    VectorConfig,
    half,
    refuse_shared,
    resplit,
    sizes,
    step_bytes,
    tile_count,
    weight_of,
)
from kernels.cuda.rows import PROCESSORS, cdiv, power
from kernels.kernel import KERNELS, CallShape
from kernels.launch import COUNTERS_BYTES, WORKSPACE, Descriptor, Launch, Pointer, Slot

ALIGN = 256
MOST_HEADS = 1 << 16  # bytes of heads on their way between layouts, as seen in cubins
_OF_HEADS = ("live", "table", "q_norm", "k_norm", "kv_slots", "kv", "q")
_OF_PRODUCT = ("live", "x", "w", "bias", "norm", "x_amax")


def _part(call: CallShape, op: str, args: tuple[str, ...], between: str, eps: str) -> CallShape:
    """A part of the call as a call of its own; `between` names what one part hands to the other."""
    shapes = {arg: call.shapes[arg] for arg in args if arg in call.shapes}
    dtypes = {arg: call.dtypes[arg] for arg in args if arg in call.dtypes}
    return replace(
        call,
        op=op,
        shapes={**shapes, between: (call.shapes["x"][0], call.shapes["w"][0])},
        dtypes={**dtypes, between: call.dtypes["q"]},
        formats={arg: f for arg, f in call.formats.items() if arg in args},
        attrs={**call.attrs, "eps": call.attrs[eps]},
    )


def product_of(call: CallShape) -> CallShape:
    return _part(call, "linear", _OF_PRODUCT, "out", "eps")


def heads_of(call: CallShape) -> CallShape:
    return _part(call, "rope_kv", _OF_HEADS, "qkv", "head_eps")


def _refuse(call: CallShape) -> str | None:
    """What no epilogue can store either."""
    return ROPE_KV.accepts(heads_of(call))


def _ends(call: CallShape) -> dict[str, Any]:
    return {"HEAD_EPS": float(call.attrs["head_eps"]), **heads_arguments(call)}


# ---- one row -------------------------------------------------------------------------


def _vector_valid(call: CallShape, config: VectorConfig) -> str | None:
    dim = call.attrs["head_dim"]
    if dim % config.block_n:
        return f"head_dim {dim} is not a multiple of block_n {config.block_n}"
    tiles, heads = call.shapes["w"][0] // config.block_n, call.shapes["w"][0] // dim
    if (heads + (tiles if config.split > 1 else 0)) * 4 > COUNTERS_BYTES:
        return f"{tiles} tiles and {heads} heads need more than {COUNTERS_BYTES // 4} counters"
    return VECTOR.valid(product_of(call), config)


def _vector_default(call: CallShape) -> VectorConfig:
    config: VectorConfig = VECTOR.default(product_of(call))
    block_n = config.block_n
    while call.attrs["head_dim"] % block_n:
        block_n //= 2
    return replace(config, block_n=block_n)


def _row_bytes(call: CallShape) -> int:
    return cdiv(call.shapes["w"][0] * 4, ALIGN) * ALIGN


def _vector_launches(call: CallShape, config: VectorConfig) -> tuple[Launch, ...]:
    ends = {
        **_ends(call),
        **head_blocks(call),
        "row_ptr": workspace("fp32"),
        "part_ptr": workspace("fp32", _row_bytes(call)) if config.split > 1 else None,
        "counter_ptr": counters(),
    }
    function = "linear_rope_kv.vector_kernel"
    return (vector_launch(product_of(call), config, function, ends),)


register(
    CudaKernel(
        name="linear_rope_kv_vector",
        op="linear_rope_kv",
        accepts=lambda call: _refuse(call) or VECTOR.accepts(product_of(call)),
        space=lambda call: VECTOR.space(product_of(call)),
        default=_vector_default,
        valid=_vector_valid,
        launches=_vector_launches,
        workspace=lambda call, config: (
            _row_bytes(call) + VECTOR.workspace(product_of(call), config)
        ),
    )
)


# ---- tiles ---------------------------------------------------------------------------


def _tile_accepts(call: CallShape) -> str | None:
    dim, rotary = call.attrs["head_dim"], rotary_dims(call)
    if dim != power(dim) or not 16 <= dim <= 256:
        return f"head_dim {dim} is no power of two from 16 to 256"
    if rotary not in (0, dim) and not call.attrs["interleaved"]:
        return f"the halves of {rotary} turned dims do not part heads of {dim} evenly"
    return _refuse(call) or TILES.accepts(product_of(call))


def _tile_valid(call: CallShape, config: TileConfig) -> str | None:
    dim = call.attrs["head_dim"]
    if config.block_n % dim:
        return f"block_n {config.block_n} is not a multiple of head_dim {dim}"
    product = product_of(call)
    if reason := TILES.valid(product, config):
        return reason
    if not config.programs:
        return None
    # Heads change their layout through shared memory, beside the operands of the next tile.
    step = step_bytes(config, weight_of(call), gated=False, half=half(product))
    heads = min(4 * config.block_n * config.block_m, MOST_HEADS)
    return refuse_shared(config.stages * step + heads)


def _widened(call: CallShape, config: TileConfig) -> TileConfig:
    """The configuration with tiles of whole heads and as much of them on their way as before."""
    dim, w = call.attrs["head_dim"], weight_of(call)
    if config.block_n % dim == 0:
        return config
    least = max(w.group, 16 * w.per)
    return replace(
        config,
        block_n=dim,
        block_m=min(config.block_m, 128 * 256 // dim),
        block_k=max(config.block_k * config.block_n // dim, least),
        warps=8 if dim * config.block_m > 128 * 64 else config.warps,
    )


def _pieces(config: TileConfig) -> int:
    """Rows on the right are in every thread's registers: halves of a large tile finish one after
    the other, so that what they need besides fits."""
    held = config.block_n * config.block_m // (32 * config.warps)
    return 2 if not config.x_left and held >= (64 if config.programs else 128) else 1


def _tile_default(call: CallShape) -> TileConfig:
    product = product_of(call)
    plain: TileConfig = TILES.default(product)
    config = _widened(call, plain)
    if config.x_left and config.block_n * config.block_m > 128 * 128:
        halved = config.block_n // 2  # registers: the rows' own work and the heads' meet here
        if halved % call.attrs["head_dim"] == 0:
            config = replace(config, block_n=halved)
        else:
            config = replace(config, block_m=config.block_m // 2)
    if config is not plain:
        s = sizes(product)
        tiles = tile_count(s, config.block_n, config.block_m)
        wanted = PROCESSORS if s.rows > 64 else 2 * PROCESSORS
        config = resplit(config, tiles, cdiv(s.k, config.block_k), wanted, 4)
    while _tile_valid(call, config) is not None and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    return config


register(
    CudaKernel(
        name="linear_rope_kv_tiles",
        op="linear_rope_kv",
        accepts=_tile_accepts,
        space=lambda call: (_widened(call, config) for config in TILES.space(product_of(call))),
        default=_tile_default,
        valid=_tile_valid,
        launches=lambda call, config: tile_launches(
            product_of(call),
            config,
            "linear_rope_kv.tiles_kernel",
            {"rows_ptr": None, "PIECES": _pieces(config), **_ends(call)},
        ),
        workspace=lambda call, config: TILES.workspace(product_of(call), config),
    )
)


# ---- a product, then rope_kv ---------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig(Config):
    """`product` of the kernel of linear, `heads` of rope_kv."""

    product: Any
    heads: Any


def _between(call: CallShape) -> int:
    """Bytes of the product's result, at the start of the scratch."""
    size = call.shapes["x"][0] * call.shapes["w"][0] * SIZES[TYPES[call.dtypes["q"]]]
    return cdiv(size, ALIGN) * ALIGN


def _moved(launch: Launch, arg: str, scratch: int) -> Launch:
    """The launch with `arg` at the start of the call's scratch and its own scratch behind."""

    def move(slot: Slot) -> Slot:
        if isinstance(slot, Pointer | Descriptor):
            if slot.arg == WORKSPACE:
                return replace(slot, offset=slot.offset + scratch)
            if slot.arg == arg:
                return replace(slot, arg=WORKSPACE)
        return slot

    return replace(launch, slots={name: move(slot) for name, slot in launch.slots.items()})


def pair(linear: CudaKernel) -> CudaKernel:
    """A kernel of linear, then rope_kv."""

    def space(call: CallShape) -> Iterator[PairConfig]:
        product, heads = product_of(call), heads_of(call)
        for config in linear.space(product):
            yield PairConfig(product=config, heads=ROPE_KV.default(heads))
        for config in ROPE_KV.space(heads):
            yield PairConfig(product=linear.default(product), heads=config)

    def launches(call: CallShape, config: PairConfig) -> tuple[Launch, ...]:
        size = _between(call)
        product = linear.launches(product_of(call), config.product)
        heads = ROPE_KV.launches(heads_of(call), config.heads)
        return (
            *(_moved(one, "out", size) for one in product),
            *(_moved(one, "qkv", size) for one in heads),
        )

    return CudaKernel(
        name=f"{linear.name}+rope_kv",
        op="linear_rope_kv",
        accepts=lambda call: linear.accepts(product_of(call)) or ROPE_KV.accepts(heads_of(call)),
        space=space,
        default=lambda call: PairConfig(
            product=linear.default(product_of(call)), heads=ROPE_KV.default(heads_of(call))
        ),
        valid=lambda call, config: (
            linear.valid(product_of(call), config.product)
            or ROPE_KV.valid(heads_of(call), config.heads)
        ),
        launches=launches,
        workspace=lambda call, config: (
            _between(call) + linear.workspace(product_of(call), config.product)
        ),
        tuned_only=linear.tuned_only,
    )


def register_pairs() -> None:
    """Of every kernel of linear there is by now."""
    for kernel in [k for k in KERNELS["cuda"] if k.op == "linear"]:
        register(pair(kernel))
