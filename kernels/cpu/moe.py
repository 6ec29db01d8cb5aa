"""Registration of the CPU kernels of moe.cpp: routing, the order of pairs, the experts' linears
(one entry per storage format, for both directions) and their weighted sum.

Imported by kernels/cpu/register.py.
"""

from __future__ import annotations

from collections.abc import Callable

from kernels.cpu.activations import ACTIVATION_CODES, GATED, SILU_CLAMPED
from kernels.cpu.basic import not_float32
from kernels.cpu.layout import ROW_BLOCK, SUFFIXES, misfit, parse_format
from kernels.cpu.linear import prepared_bytes
from kernels.kernel import CallShape, Kernel, register

SCORES = {"softmax": 0, "sigmoid": 1, "chosen": 2}  # enum Score in moe.cpp
MAX_EXPERTS, MAX_CHOICES = 1024, 64
# Code of a gate's activation by `act`; 0: nothing is gated.
ACTS = {
    "": 0,
    **{act: ACTIVATION_CODES[of_gate] for act, of_gate in GATED.items()},
    "swiglu_clamped": SILU_CLAMPED,
}


def _accepts_route(call: CallShape) -> str | None:
    experts, attrs = call.shapes["logits"][1], call.attrs
    if attrs["score"] not in SCORES:
        return f"score={attrs['score']!r} is not one of {', '.join(SCORES)}"
    if experts > MAX_EXPERTS or attrs["k"] > min(experts, MAX_CHOICES):
        return f"{attrs['k']} of {experts} experts: at most {MAX_CHOICES} of {MAX_EXPERTS}"
    groups, kept, counted = attrs["groups"], attrs["kept_groups"], attrs["group_best"]
    if experts % groups or not kept <= groups or counted > experts // groups:
        return f"{experts} experts cannot be {groups} groups of which {kept} are kept"
    if groups > 1 and kept * (experts // groups) < attrs["k"]:
        return f"{kept} groups of {experts // groups} experts hold fewer than {attrs['k']}"
    return not_float32(call)


register(
    Kernel(
        name="route",
        op="route",
        target="cpu",
        entry="hs_route",
        params=(
            "ptr:live",
            "i64:live_index",
            "ptr:logits",
            "ptr:bias",
            "ptr:ids",
            "ptr:weights",
            "i64:experts",
            "i64:k",
            "i64:score",
            "i64:groups",
            "i64:kept_groups",
            "i64:group_best",
            "i64:renormalise",
            "f64:scale",
        ),
        accepts=_accepts_route,
        scalars=lambda call: {
            "live_index": call.attrs.get("live_index", 0),
            **{n: int(call.attrs[n]) for n in ("k", "groups", "kept_groups", "group_best")},
            "experts": call.shapes["logits"][1],
            "score": SCORES[call.attrs["score"]],
            "renormalise": int(call.attrs["renormalise"]),
            "scale": float(call.attrs["scale"]),
        },
    )
)

register(
    Kernel(
        name="expert_order",
        op="expert_order",
        target="cpu",
        entry="hs_expert_order",
        params=(
            *("ptr:live", "i64:live_index", "ptr:ids", "ptr:order", "ptr:starts"),
            *("i64:experts", "i64:k"),
        ),
        accepts=lambda call: (
            None
            if call.attrs["experts"] <= MAX_EXPERTS
            else f"{call.attrs['experts']} experts: at most {MAX_EXPERTS}"
        ),
        scalars=lambda call: {
            "live_index": call.attrs.get("live_index", 0),
            "experts": call.attrs["experts"],
            "k": call.shapes["ids"][1],
        },
    )
)

register(
    Kernel(
        name="moe_combine",
        op="moe_combine",
        target="cpu",
        entry="hs_moe_combine",
        params=(
            "ptr:live",
            "i64:live_index",
            "ptr:y",
            "ptr:weights",
            "ptr:shared",
            "ptr:gate",
            "ptr:residual",
            "ptr:out",
            "i64:d",
            "i64:k",
        ),
        accepts=not_float32,
        scalars=lambda call: {
            "live_index": call.attrs.get("live_index", 0),
            "d": call.shapes["y"][2],
            "k": call.shapes["y"][1],
        },
    )
)


def _accepts(kind: str) -> Callable[[CallShape], str | None]:
    def accepts(call: CallShape) -> str | None:
        experts, n, k = call.shapes["w"]
        if reason := misfit(call.formats["w"], kind, k):
            return reason
        act = call.attrs.get("act", "")
        if act not in ACTS:
            return f"act={act!r} is not one of {', '.join(map(repr, ACTS))}"
        if act and n % 2:
            return f"{act} takes an even N, got N={n}"
        if experts > MAX_EXPERTS:
            return f"{experts} experts: at most {MAX_EXPERTS}"
        return not_float32(call)

    return accepts


def _scalars(call: CallShape) -> dict[str, int | float]:
    experts, n, k = call.shapes["w"]
    act = ACTS[call.attrs.get("act", "")]
    group = parse_format(call.formats["w"])[1]
    return {
        "experts": experts,
        "k": k,
        "n": n // 2 if act else n,
        "shared": call.shapes["order"][1] if len(call.shapes["x"]) == 2 else 1,
        "act": act,
        **({"group": group} if group else {}),
    }


def _workspace(call: CallShape) -> int:
    """Prepared rows of every pair; each expert's begin a new block."""
    tokens, choices = call.shapes["order"]
    pairs, experts = tokens * choices, call.shapes["w"][0]
    rows = pairs + min(pairs, experts) * (ROW_BLOCK - 1)
    return rows * prepared_bytes(call.formats["w"], call.shapes["w"][2])


for _kind, _suffix in SUFFIXES.items():
    for _op in ("moe_gate_up", "moe_down"):
        register(
            Kernel(
                name=f"{_op}_{_suffix}",
                op=_op,
                target="cpu",
                entry=f"hs_experts_{_suffix}",
                params=(
                    "ptr:live",
                    "ptr:x",
                    "ptr:order",
                    "ptr:starts",
                    "ptr:bias",
                    "ptr:out",
                    "ptr:workspace",
                    "i64:experts",
                    "i64:k",
                    "i64:n",
                    "i64:shared",
                    "i64:act",
                    "ptr:w.data",
                    *(("i64:group", "ptr:w.scale") if _kind.startswith("int") else ()),
                ),
                accepts=_accepts(_kind),
                scalars=_scalars,
                workspace=_workspace,
            )
        )
