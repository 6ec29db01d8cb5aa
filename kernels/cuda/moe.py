"""Registration of the CUDA kernels of mixtures of experts. Imported by kernels/cuda/register.py.

Expert products are one launch over tiles of (expert, pairs, outputs). How many tiles an expert has
is known on the device only, so programs find theirs from `starts`; the grid is the most there can
be, and the rest leave at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cuda.kernel import Config, CudaKernel, launch, pointer, register, stored
from kernels.cuda.product import TileConfig, half, weight_of, weight_slot
from kernels.cuda.rows import cdiv, power, row_default, row_grid, row_space
from kernels.cuda.stack import stack_default, stack_reason, stack_space
from kernels.kernel import CallShape
from kernels.launch import Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class WarpConfig(Config):
    warps: int


def _route(call: CallShape, config: WarpConfig) -> tuple[Launch, ...]:
    tokens, experts = call.shapes["logits"]
    attrs = call.attrs
    groups = attrs["groups"]
    return (
        launch(
            "moe.route_kernel",
            (tokens, 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            logits_ptr=pointer(call, "logits"),
            bias_ptr=pointer(call, "bias"),
            ids_ptr=pointer(call, "ids"),
            weights_ptr=pointer(call, "weights"),
            LIVE=attrs.get("live_index", 0),
            GROUPS=groups,
            SIZE=experts // groups,
            CHOICES=attrs["k"],
            SCORE=attrs["score"],
            KEPT=attrs["kept_groups"],
            GROUP_BEST=attrs["group_best"],
            RENORMALISE=attrs["renormalise"],
            SCALE=float(attrs["scale"]),
            BLOCK_G=power(groups),
            BLOCK_S=power(experts // groups),
            BLOCK_K=power(attrs["k"]),
        ),
    )


register(
    CudaKernel(
        name="route",
        op="route",
        accepts=lambda call: None,
        space=lambda call: [WarpConfig(warps=w) for w in (1, 2, 4)],
        default=lambda call: WarpConfig(warps=1),  # a few values per lane, no barrier
        launches=_route,
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig(Config):
    block: int
    warps: int


def _order(call: CallShape, config: OrderConfig) -> tuple[Launch, ...]:
    return (
        launch(
            "moe.order_kernel",
            (call.attrs["experts"], 1, 1),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            ids_ptr=pointer(call, "ids"),
            order_ptr=pointer(call, "order"),
            starts_ptr=pointer(call, "starts"),
            LIVE=call.attrs.get("live_index", 0),
            EXPERTS=call.attrs["experts"],
            CHOICES=call.shapes["ids"][1],
            BLOCK=config.block,
        ),
    )


def _order_default(call: CallShape) -> OrderConfig:
    tokens, k = call.shapes["ids"]
    block = min(max(power(tokens * k), 32), 2048)
    return OrderConfig(block=block, warps=min(8, max(1, block // 256)))


register(
    CudaKernel(
        name="expert_order",
        op="expert_order",
        accepts=lambda call: None,
        space=lambda call: [
            OrderConfig(block=b, warps=w) for b in (256, 1024, 2048, 4096) for w in (2, 4, 8)
        ],
        default=_order_default,
        launches=_order,
    )
)


def _sizes(call: CallShape) -> tuple[int, int, int, int, bool]:
    """Experts, outputs, inputs, pairs of the bucket, whether the weight is gate and up."""
    experts, n, k = call.shapes["w"]
    tokens, choices, outputs = call.shapes["out"]
    return experts, outputs, k, tokens * choices, n == 2 * outputs


def _experts_valid(call: CallShape, config: TileConfig) -> str | None:
    _, outputs, k, _, gated = _sizes(call)
    return stack_reason(call, config, outputs=outputs, k=k, gated=gated)


def _experts_default(call: CallShape) -> TileConfig:
    experts, outputs, k, pairs, gated = _sizes(call)
    # Pairs of an expert when they are spread evenly; an expert with more has more tiles.
    return stack_default(call, rows=cdiv(pairs, experts), outputs=outputs, k=k, gated=gated)


def _experts(call: CallShape, config: TileConfig) -> tuple[Launch, ...]:
    experts, outputs, k, pairs, gated = _sizes(call)
    w = weight_of(call)
    scaled = w.bits or w.row_scale
    # An expert's last tile may be partial: at most one for each expert that has pairs.
    row_tiles = min(pairs, pairs // config.block_m + experts)
    return (
        launch(
            "moe.experts_kernel",
            (row_tiles * cdiv(outputs, config.block_n), 1, 1),
            warps=config.warps,
            stages=config.stages,
            live_ptr=pointer(call, "live"),
            x_ptr=pointer(call, "x"),
            order_ptr=pointer(call, "order"),
            starts_ptr=pointer(call, "starts"),
            w=weight_slot("w", w, experts * call.shapes["w"][1], k, config),
            scale_ptr=stored("w", "scale", "fp16" if w.bits else "fp32") if scaled else None,
            bias_ptr=pointer(call, "bias"),
            out_ptr=pointer(call, "out"),
            EXPERTS=experts,
            SHARE=call.shapes["order"][1] if len(call.shapes["x"]) == 2 else 1,
            OUTPUTS=outputs,
            K=k,
            ACT=call.attrs.get("act", ""),
            GATED=gated,
            BITS=w.bits,
            GROUP=w.group,
            W_TMA=config.tma,
            HALF=half(call),
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            BLOCK_E=power(experts),
            SUPER=8,
            STAGES=config.stages,
        ),
    )


for _op in ("moe_gate_up", "moe_down"):
    register(
        CudaKernel(
            name=_op,
            op=_op,
            accepts=lambda call: None,
            space=lambda call: stack_space(call, _experts_default(call)),
            default=_experts_default,
            valid=_experts_valid,
            launches=_experts,
        )
    )


register(
    CudaKernel(
        name="moe_combine",
        op="moe_combine",
        accepts=lambda call: None,
        space=row_space,
        default=lambda call: row_default(call.shapes["out"][1]),
        launches=lambda call, config: (
            launch(
                "moe.combine_kernel",
                row_grid(call.shapes["out"][0], call.shapes["out"][1], config),
                warps=config.warps,
                live_ptr=pointer(call, "live"),
                y_ptr=pointer(call, "y"),
                weights_ptr=pointer(call, "weights"),
                shared_ptr=pointer(call, "shared"),
                gate_ptr=pointer(call, "gate"),
                residual_ptr=pointer(call, "residual"),
                out_ptr=pointer(call, "out"),
                LIVE=call.attrs.get("live_index", 0),
                CHOICES=call.shapes["y"][1],
                WIDTH=call.shapes["out"][1],
                BLOCK=config.block,
            ),
        ),
    )
)
