"""Registration of the CPU linear kernels: one entry per storage format, one parameter layout.

A call is y = epilogue(W norm(x)[rows] + bias): see the op `linear`; slots as in linear.cpp `Slot`.
Imported by kernels/cpu/register.py.
"""

from __future__ import annotations

from collections.abc import Callable

from kernels.cpu.activations import ACTIVATION_CODES, GATED
from kernels.cpu.layout import BF16_STEP, ROW_BLOCK, SUFFIXES, misfit, parse_format
from kernels.kernel import CallShape, Kernel, register

_PARAMS = (
    "ptr:live",
    "ptr:x",
    "ptr:rows",
    "ptr:bias",
    "ptr:norm",
    "ptr:residual",
    "ptr:residual_rows",
    "ptr:out",
    "ptr:workspace",
    "i64:live_index",
    "i64:k",
    "i64:n",
    "i64:gated",
    "i64:act",
    "f64:eps",
    "f64:scale",
    "f64:softcap",
    "ptr:w.data",
)
_GROUPED_PARAMS = (*_PARAMS, "i64:group", "ptr:w.scale")
ACTS = {"": 0, "swiglu": 1, "geglu_tanh": 2, "swiglu_clamped": 3}  # enum Act in linear_call.h
_ACTIVATIONS = ("x", "norm", "residual", "bias", "out")


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def accepts_format(kind: str) -> Callable[[CallShape], str | None]:
    """`accepts` of a product whose weight is stored as `kind`."""

    def accepts(call: CallShape) -> str | None:
        n, k = call.shapes["w"]
        if reason := misfit(call.formats.get("w", call.dtypes.get("w", "")), kind, k):
            return reason
        if x_format := call.attrs.get("x_format"):
            return f"x is quantized to {x_format}: needs a GPU with {x_format} tensor cores"
        act = call.attrs["act"]
        if act and act not in GATED and act not in ACTIVATION_CODES:
            known = ", ".join((*GATED, *ACTIVATION_CODES))
            return f"act={act!r} is none of {known}"
        if act in GATED and (n % 2 or "residual" in call.shapes):
            return f"{act} takes an even N and no residual, got N={n}"
        wrong = [
            f"{a} is {call.dtypes[a]}"
            for a in _ACTIVATIONS
            if call.dtypes.get(a, "float32") != "float32"
        ]
        return f"activations are float32 on CPU: {', '.join(wrong)}" if wrong else None

    return accepts


def linear_scalars(call: CallShape) -> dict[str, int | float]:
    n, k = call.shapes["w"]
    act = call.attrs["act"]
    group = parse_format(call.formats.get("w", "float32"))[1]
    return {
        "live_index": int(call.attrs["live_index"]),
        "k": k,
        "n": n // 2 if act in GATED else n,
        "gated": int(act in GATED),
        "act": ACTIVATION_CODES[GATED.get(act, act)] if act else 0,
        "eps": float(call.attrs["eps"]),
        "scale": float(call.attrs["scale"]),
        "softcap": float(call.attrs["softcap"]),
        **({"group": group} if group else {}),
    }


def prepared_bytes(format: str, k: int) -> int:
    """Bytes of a row prepared for the level that needs most: a float panel, or int8 with a scale
    and a sum per group. As in linear_call.h."""
    group = parse_format(format)[1]
    return _up(k, 64) + 8 * (k // group) if group else _up(k, BF16_STEP) * 4


def workspace_bytes(call: CallShape, rows: int) -> int:
    """Bytes of `rows` prepared rows."""
    row = prepared_bytes(call.formats.get("w", "float32"), call.shapes["w"][1])
    return _up(rows, ROW_BLOCK) * row


for _kind, _suffix in SUFFIXES.items():
    register(
        Kernel(
            name=f"linear_{_suffix}",
            op="linear",
            target="cpu",
            entry=f"hs_linear_{_suffix}",
            params=_GROUPED_PARAMS if _kind.startswith("int") else _PARAMS,
            accepts=accepts_format(_kind),
            scalars=linear_scalars,
            workspace=lambda call: workspace_bytes(call, call.shapes["out"][0]),
        )
    )
