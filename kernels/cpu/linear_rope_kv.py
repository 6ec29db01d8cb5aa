"""Registration of the CPU kernels of `linear_rope_kv`, one per storage format of the weight: the
product of linear.py into scratch, and from there the heads' way into the KV pages of rope.py.

Imported by kernels/cpu/register.py.
"""

from __future__ import annotations

from collections.abc import Callable

from kernels.cpu.layout import SUFFIXES
from kernels.cpu.linear import accepts_format, linear_scalars, workspace_bytes
from kernels.cpu.rope import HEAD_PARAMS, head_scalars, refuse_heads
from kernels.kernel import CallShape, Kernel, register

# linear_rope_kv in rope.cpp.
_PARAMS = (
    *HEAD_PARAMS,
    "ptr:x",
    "ptr:bias",
    "ptr:norm",
    "ptr:workspace",
    "i64:k",
    "f64:eps",
    "ptr:w.data",
)
_GROUPED_PARAMS = (*_PARAMS, "i64:group", "ptr:w.scale")
_PLAIN = {"act": "", "live_index": 0, "scale": 1.0, "softcap": 0.0}


def _accepts(kind: str) -> Callable[[CallShape], str | None]:
    def accepts(call: CallShape) -> str | None:
        for name, value in _PLAIN.items():
            if call.attrs[name] != value:
                return f"{name}={call.attrs[name]!r} of the projection is not {value!r}"
        return accepts_format(kind)(call) or refuse_heads(call)

    return accepts


def _workspace(call: CallShape) -> int:
    """The product, then what it needs itself."""
    rows, width = call.shapes["x"][0], call.shapes["w"][0]
    return rows * width * 4 + workspace_bytes(call, rows)


for _kind, _suffix in SUFFIXES.items():
    register(
        Kernel(
            name=f"linear_rope_kv_{_suffix}",
            op="linear_rope_kv",
            target="cpu",
            entry=f"hs_linear_rope_kv_{_suffix}",
            params=_GROUPED_PARAMS if _kind.startswith("int") else _PARAMS,
            accepts=_accepts(_kind),
            scalars=lambda call: {**linear_scalars(call), **head_scalars(call)},
            workspace=_workspace,
        )
    )
