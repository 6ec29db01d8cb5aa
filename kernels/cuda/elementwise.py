"""Registration of the elementwise CUDA kernels. Imported by kernels/cuda/register.py."""

from __future__ import annotations

from kernels.cuda.kernel import CudaKernel, launch, pointer, register
from kernels.cuda.rows import RowConfig, refuse_types, row_default, row_grid, row_space
from kernels.kernel import CallShape
from kernels.launch import Launch

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
INPUTS = {"add": ("a", "b"), "clip": ("x",), "activation": ("x",), "gated": ("gate", "up")}


def _accepts(call: CallShape) -> str | None:
    act = call.attrs.get("act")
    known = {"gated": tuple(GATED), "activation": ACTIVATIONS}.get(call.op, (act,))
    if act not in known:
        return f"act {act!r} is unknown: supported are {', '.join(map(str, known))}"
    return refuse_types(call, *INPUTS[call.op], "out")


def _launches(call: CallShape, config: RowConfig) -> tuple[Launch, ...]:
    rows, width = call.shapes["out"]
    first, *second = INPUTS[call.op]
    act = call.attrs.get("act")
    return (
        launch(
            "elementwise.elementwise_kernel",
            row_grid(rows, width, config),
            warps=config.warps,
            live_ptr=pointer(call, "live"),
            a_ptr=pointer(call, first),
            b_ptr=pointer(call, second[0]) if second else None,
            out_ptr=pointer(call, "out"),
            LIVE=call.attrs.get("live_index", 0),
            ACT=GATED.get(act, act) if act else None,
            LIMIT=float(call.attrs["limit"]) if "limit" in call.attrs else None,
            WIDTH=width,
            BLOCK=config.block,
        ),
    )


for _op in INPUTS:
    register(
        CudaKernel(
            name=_op,
            op=_op,
            accepts=_accepts,
            space=row_space,
            default=lambda call: row_default(call.shapes["out"][1]),
            launches=_launches,
        )
    )
