"""Registration of the row-wise CPU kernels of basic.cpp: embed, gather, norms, elementwise.

Imported by kernels/cpu/register.py.
"""

from __future__ import annotations

from collections.abc import Callable

from kernels.cpu.activations import ACTIVATION_CODES, GATED
from kernels.cpu.layout import FORMAT_CODES, misfit, parse_format
from kernels.kernel import CallShape, Kernel, register

POOLINGS = ("last", "cls", "mean")  # codes of basic.cpp

# Activations, norms and biases are float32 on CPU.
FLOATS = frozenset(
    {
        "x",
        "gate",
        "up",
        "a",
        "b",
        "q",
        "k",
        "v",
        "k_shared",
        "qkv",
        "table",
        "logits",
        "inv_freq",
        "out",
    }
)


def not_float32(call: CallShape) -> str | None:
    wrong = [
        f"{name} is {call.dtypes[name]}"
        for name in call.dtypes
        if name in FLOATS and call.dtypes[name] != "float32"
    ]
    return f"activations are float32 on CPU: {', '.join(wrong)}" if wrong else None


def refuse_amax(call: CallShape) -> str | None:
    if "out_amax" in call.shapes:
        return "maxima of rows are for fp8 products: needs a GPU with fp8 tensor cores"
    return None


def _accepts_table(kind: str) -> Callable[[CallShape], str | None]:
    def accepts(call: CallShape) -> str | None:
        width = call.shapes["table"][1]
        return refuse_amax(call) or misfit(call.formats.get("table", "float32"), kind, width)

    return accepts


def _table_scalars(call: CallShape) -> dict[str, int | float]:
    kind, group = parse_format(call.formats.get("table", "float32"))
    return {"format": FORMAT_CODES[kind], "d": call.shapes["table"][1], "group": group}


for _kind in FORMAT_CODES:
    register(
        Kernel(
            name=f"embed_{_kind}",
            op="embed",
            target="cpu",
            entry="hs_embed",
            params=(
                "ptr:live",
                "ptr:tokens",
                "ptr:last_token",
                "ptr:out",
                "f64:scale",
                "i64:format",
                "i64:d",
                "i64:group",
                "ptr:table.data",
                *(("ptr:table.scale",) if _kind.startswith("int") else ()),
            ),
            accepts=_accepts_table(_kind),
            scalars=lambda call: {"scale": float(call.attrs["scale"]), **_table_scalars(call)},
        )
    )

register(
    Kernel(
        name="gather",
        op="gather",
        target="cpu",
        entry="hs_gather",
        params=("ptr:live", "ptr:x", "ptr:rows", "ptr:out", "i64:d"),
        accepts=not_float32,
        scalars=lambda call: {"d": call.shapes["x"][1]},
    )
)


def _accepts_tables(kind: str) -> Callable[[CallShape], str | None]:
    def accepts(call: CallShape) -> str | None:
        if reason := _accepts_table(kind)(call):
            return reason
        table, types = (call.formats.get(name, "float32") for name in ("table", "types"))
        try:
            same = parse_format(types)[1] == parse_format(table)[1]
        except ValueError as error:
            return str(error)
        return None if same else f"types are stored as {types}, the table as {table}"

    return accepts


def _tables_scalars(call: CallShape) -> dict[str, int | float]:
    kind, _ = parse_format(call.formats.get("types", "float32"))
    return {
        "offset": call.attrs["offset"],
        "types_format": FORMAT_CODES[kind],
        **_table_scalars(call),
    }


for _kind in FORMAT_CODES:
    register(
        Kernel(
            name=f"embed_positions_{_kind}",
            op="embed_positions",
            target="cpu",
            entry="hs_embed_positions",
            params=(
                *("ptr:live", "ptr:x", "ptr:positions", "ptr:out"),
                *("i64:offset", "i64:format", "i64:types_format", "i64:d", "i64:group"),
                *("ptr:table.data", "ptr:types.data"),
                *(("ptr:table.scale", "ptr:types.scale") if _kind.startswith("int") else ()),
            ),
            accepts=_accepts_tables(_kind),
            scalars=_tables_scalars,
        )
    )

register(
    Kernel(
        name="pool",
        op="pool",
        target="cpu",
        entry="hs_pool",
        params=(
            *("ptr:live", "ptr:x", "ptr:seq_start", "ptr:embedding", "ptr:status"),
            *("i64:d", "i64:pooling", "i64:normalise"),
        ),
        accepts=not_float32,
        scalars=lambda call: {
            "d": call.shapes["x"][1],
            "pooling": POOLINGS.index(call.attrs["pooling"]),
            "normalise": int(call.attrs["normalise"]),
        },
    )
)


def _norm(call: CallShape) -> dict[str, int | float]:
    """Row norms are head norms with one head."""
    heads = call.attrs.get("heads", 1)
    dim = call.shapes["x"][1] // heads
    return {
        "live_index": call.attrs.get("live_index", 0),
        "heads": heads,
        "d": dim,
        "own": dim if call.shapes["w"][0] == heads * dim else 0,
        "centre": int(call.attrs.get("centre", call.op == "layer_norm")),
        "eps": float(call.attrs["eps"]),
    }


for _name in ("rms_norm", "layer_norm", "head_norm"):
    register(
        Kernel(
            name=_name,
            op=_name,
            target="cpu",
            entry="hs_norm",
            params=(
                "ptr:live",
                "i64:live_index",
                "ptr:x",
                "ptr:w",
                "ptr:bias",
                "ptr:residual",
                "ptr:out",
                "i64:heads",
                "i64:d",
                "i64:own",
                "i64:centre",
                "f64:eps",
            ),
            accepts=not_float32,
            scalars=_norm,
        )
    )


def _elementwise(call: CallShape) -> dict[str, int | float]:
    act = call.attrs.get("act", "")
    return {
        "live_index": call.attrs.get("live_index", 0),
        "d": call.shapes["out"][1],
        "act": ACTIVATION_CODES[GATED.get(act, act)] if act else 0,
        "limit": float(call.attrs.get("limit", 0.0)),
    }


# Name, its inputs, what it reads beyond them.
for _name, _inputs, _more in (
    ("add", ("a", "b"), ()),
    ("gated", ("gate", "up"), ("i64:act",)),
    ("activation", ("x",), ("i64:act",)),
    ("clip", ("x",), ("f64:limit",)),
):
    register(
        Kernel(
            name=_name,
            op=_name,
            target="cpu",
            entry=f"hs_{_name}",
            params=(
                *("ptr:live", "i64:live_index"),
                *(f"ptr:{n}" for n in _inputs),
                *("ptr:out", "i64:d"),
                *_more,
            ),
            accepts=not_float32,
            scalars=_elementwise,
        )
    )
