"""Fusion: rules that rewrite a Program into one with fewer, larger calls on fewer rows. Called by
the pipeline between build and lower.

Every rule is a function Program -> Program that is correct alone and in any order: a test runs each
subset against the op references. A fused call always takes the place of the last call it replaces,
so everything it reads is written by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from compiler.program import Call, Dim, Program, Value, rewrite, verify
from kernels.ops.mlp import GATED


def merge_qkv(program: Program) -> Program:
    """q, k, v linears, head norms, clips, rope and kv_write -> one linear and rope_kv."""
    edit = _Edit(program)
    for write in program.calls:
        if write.op != "kv_write" or "v" not in write.ins or "k_shared" in write.ins:
            continue
        attention = [
            c
            for c in program.calls
            if c.op == "attention" and c.attrs["layer_offset"] == write.attrs["layer_offset"]
        ]
        if len(attention) != 1:
            continue
        sides = [
            _projection(program, name, user)
            for name, user in (
                (attention[0].ins["q"], attention[0]),
                (write.ins["k"], write),
                (write.ins["v"], write),
            )
        ]
        if any(side is None for side in sides):
            continue
        q, k, v = (side for side in sides if side is not None)
        linears = (q.linear, k.linear, v.linear)
        if (
            not _mergeable(linears)
            or v.norm
            or v.rope
            or any(side.rope.attrs["start"] for side in (q, k) if side.rope)
            or len({bool(side.norm) for side in (q, k)}) != 1
            or len({bool(side.rope) for side in (q, k)}) != 1
            or len({side.clip.attrs["limit"] if side.clip else 0.0 for side in (q, k, v)}) != 1
        ):
            continue
        ins = {"live": "live", "qkv": edit.merged_linear(linears, "qkv", at=write)}
        eps, centre, interleaved = 0.0, False, False
        if q.rope and k.rope:
            if q.rope.ins["table"] != k.rope.ins["table"]:
                continue
            ins["table"], interleaved = q.rope.ins["table"], q.rope.attrs["interleaved"]
        if q.norm and k.norm:
            ins |= {"q_norm": q.norm.ins["w"], "k_norm": k.norm.ins["w"]}
            eps, centre = q.norm.attrs["eps"], q.norm.attrs["centre"]
        ins |= {"kv_slots": write.ins["kv_slots"], "kv": write.ins["kv"]}
        attrs = {
            **write.attrs,
            "heads": attention[0].attrs["heads"],
            "eps": eps,
            "centre": centre,
            "clip": q.clip.attrs["limit"] if q.clip else 0.0,
            "interleaved": interleaved,
        }
        outs = {"q": attention[0].ins["q"], **write.outs}
        edit.insert(write, Call(op="rope_kv", ins=ins, outs=outs, attrs=attrs))
        between = (c for side in (q, k, v) for c in (side.norm, side.clip, side.rope) if c)
        edit.drop(write, *linears, *between)
    return edit.result()


def merge_gated(program: Program) -> Program:
    """gate and up linears and a gated activation -> one linear with that act."""
    edit = _Edit(program)
    for call in program.calls:
        if call.op != "gated":
            continue
        gate, up = (_only(program, call.ins[side], call, "linear") for side in ("gate", "up"))
        if gate is None or up is None or gate is up or not _mergeable((gate, up)):
            continue
        out, act = call.outs["out"], call.attrs["act"]
        edit.merged_linear((gate, up), "gate_up", at=call, out=out, act=act)
        edit.drop(call, gate, up)
    return edit.result()


def activation_into_linear(program: Program) -> Program:
    """linear, then activation -> linear with that act."""
    edit = _Edit(program)
    for call in program.calls:
        linear = _only(program, call.ins["x"], call, "linear") if call.op == "activation" else None
        if linear is None or not _plain(linear):
            continue
        attrs = {**linear.attrs, "act": call.attrs["act"]}
        edit.insert(call, replace(linear, outs=call.outs, attrs=attrs))
        edit.drop(call, linear)
    return edit.result()


def rows_into_linear(program: Program) -> Program:
    """gather, then linear -> linear that reads only the wanted rows (the LM head)."""
    edit = _Edit(program)
    for call in program.calls:
        gather = _only(program, call.ins["x"], call, "gather") if call.op == "linear" else None
        if gather is None or "residual" in call.ins or "rows" in call.ins:
            continue
        edit.insert(
            call, replace(call, ins={**call.ins, "x": gather.ins["x"], "rows": gather.ins["rows"]})
        )
        edit.drop(call, gather)
    return edit.result()


def norm_into_linear(program: Program) -> Program:
    """rms_norm whose only readers are linears -> linears that normalise their input."""
    edit = _Edit(program)
    for norm in program.calls:
        if norm.op != "rms_norm" or "residual" in norm.ins:
            continue
        name = norm.outs["out"]
        readers = program.consumers(name)
        if not all(
            c.op == "linear" and "norm" not in c.ins and c.ins.get("residual") != name
            for c in readers
        ):
            continue
        for call in readers:
            ins = {**call.ins, "x": norm.ins["x"], "norm": norm.ins["w"]}
            edit.insert(
                call, replace(call, ins=ins, attrs={**call.attrs, "eps": norm.attrs["eps"]})
            )
            edit.drop(call)
        edit.drop(norm)
    return edit.result()


def residual_into_linear(program: Program) -> Program:
    """linear, then add -> linear that adds the residual."""
    return _residual_into(
        program,
        "linear",
        lambda linear: (
            not ("rows" in linear.ins or linear.attrs["act"] in GATED or linear.attrs["softcap"])
        ),
    )


def residual_into_combine(program: Program) -> Program:
    """moe_combine, then add -> moe_combine that adds the residual."""
    return _residual_into(program, "moe_combine")


def residual_into_norm(program: Program) -> Program:
    """rms_norm, then add -> rms_norm that adds the residual (a norm after the branch)."""
    return _residual_into(program, "rms_norm")


def _residual_into(
    program: Program, op: str, fits: Callable[[Call], bool] = lambda call: True
) -> Program:
    edit = _Edit(program)
    for add in program.calls:
        if add.op != "add" or add.ins["a"] == add.ins["b"]:
            continue
        for side, other in (("b", "a"), ("a", "b")):
            made = _only(program, add.ins[side], add, op)
            if made is None or "residual" in made.ins or not fits(made):
                continue
            ins = {**made.ins, "residual": add.ins[other]}
            edit.insert(add, replace(made, ins=ins, outs=add.outs))
            edit.drop(add, made)
            break
    return edit.result()


# Calls that compute each row from the same row of what they read.
ROW_WISE = frozenset(
    """
    linear rms_norm layer_norm add gated activation
    route expert_order moe_gate_up moe_down moe_combine
    """.split()  # noqa: SIM905 - a list of quoted names is three times as long
)
# Which argument of a linear chooses the rows of which other one.
_CHOSEN_BY = {"x": "rows", "residual": "residual_rows"}
_ALL_TOKENS, _LOGIT_ROWS = 0, 2  # `live_index`


def only_chosen_rows(program: Program) -> Program:
    """Calls of which only chosen rows are read -> calls that compute only those rows.

    Behind the last attention nothing mixes rows any more, so only the logit rows need to go through
    the rest of the last layer, experts and all.
    """
    chosen = {
        call.ins[choice]
        for call in program.calls
        if call.op == "linear"
        for choice in _CHOSEN_BY.values()
        if choice in call.ins
    }
    for rows in sorted(chosen):
        if program.values[rows].kind == "input":
            program = _narrowed(program, rows)
    return program


def _narrowed(program: Program, rows: str) -> Program:
    narrow = _needing_only(program, rows)
    names = {out for call in program.calls if id(call) in narrow for out in call.outs.values()}
    edit = _Edit(program)
    for name in names:
        value = program.values[name]
        if value.dims[0] == "tokens":  # where experts start is of no row
            dims = (program.values[rows].dims[0], *value.dims[1:])
            edit.values[name] = replace(value, dims=dims)
    for call in program.calls:
        ins, attrs = dict(call.ins), dict(call.attrs)
        if id(call) in narrow and "live_index" in attrs:
            attrs["live_index"] = _LOGIT_ROWS
        for arg, choice in _CHOSEN_BY.items() if call.op == "linear" else ():
            if call.ins.get(arg) in names:
                ins.pop(choice, None)
            elif id(call) in narrow and arg in call.ins:
                ins[choice] = rows
        if (ins, attrs) != (call.ins, call.attrs):
            edit.insert(call, replace(call, ins=ins, attrs=attrs))
            edit.drop(call)
    return edit.result()


def _needing_only(program: Program, rows: str) -> set[int]:
    """Ids of the calls that can compute nothing but the rows `rows` chooses: all their readers need
    only those, and what they read has been narrowed too, or is read through a choice of its own.
    """
    readers: dict[str, list[tuple[Call, str]]] = {}
    for call in program.calls:
        for arg, name in call.ins.items():
            readers.setdefault(name, []).append((call, arg))
    made = {out: id(call) for call in program.calls for out in call.outs.values()}
    found = {
        id(call)
        for call in program.calls
        if call.op in ROW_WISE and call.attrs.get("live_index", _ALL_TOKENS) == _ALL_TOKENS
    }

    def read_by_choice(call: Call) -> bool:
        return all(
            program.values[name].kind == "temp"
            and (
                id(reader) in found
                or (reader.op == "linear" and reader.ins.get(_CHOSEN_BY.get(arg, "")) == rows)
            )
            for name in call.outs.values()
            for reader, arg in readers.get(name, ())
        )

    def reads_narrow(call: Call) -> bool:
        return all(
            made.get(name) in found or (call.op == "linear" and arg in _CHOSEN_BY)
            for arg, name in call.ins.items()
            if "tokens" in program.values[name].dims
        )

    before = -1
    while before != len(found):
        before = len(found)
        for calls, holds in ((program.calls[::-1], read_by_choice), (program.calls, reads_narrow)):
            for call in calls:
                if id(call) in found and not holds(call):
                    found.discard(id(call))
    return found


def linear_into_rope_kv(program: Program) -> Program:
    """linear, then rope_kv -> one call from the layer's input to the cache."""
    edit = _Edit(program)
    for write in program.calls:
        linear = (
            _only(program, write.ins["qkv"], write, "linear") if write.op == "rope_kv" else None
        )
        if linear is None or not _plain(linear) or "rows" in linear.ins:
            continue
        ins = {**linear.ins, **{arg: v for arg, v in write.ins.items() if arg != "qkv"}}
        attrs = {**write.attrs, **linear.attrs, "head_eps": write.attrs["eps"]}
        edit.insert(write, Call(op="linear_rope_kv", ins=ins, outs=write.outs, attrs=attrs))
        edit.drop(write, linear)
    return edit.result()


RULES = (
    merge_qkv,
    merge_gated,
    activation_into_linear,
    rows_into_linear,
    norm_into_linear,
    residual_into_norm,
    residual_into_combine,
    residual_into_linear,
    only_chosen_rows,
    linear_into_rope_kv,
)


def fuse(program: Program) -> Program:
    for rule in RULES:
        program = verify(rule(program))
    return program


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projection:
    """How q, k or v came to be: linear, then maybe a head norm, a clip, rope."""

    linear: Call
    norm: Call | None
    clip: Call | None
    rope: Call | None


def _projection(program: Program, name: str, user: Call) -> _Projection | None:
    rope = _only(program, name, user, "rope")
    if rope is not None:
        name, user = rope.ins["x"], rope
    clip = _only(program, name, user, "clip")
    if clip is not None:
        name, user = clip.ins["x"], clip
    norm = _only(program, name, user, "head_norm")
    if norm is not None:
        name, user = norm.ins["x"], norm
    linear = _only(program, name, user, "linear")
    return None if linear is None else _Projection(linear=linear, norm=norm, clip=clip, rope=rope)


def _only(program: Program, name: str, user: Call, op: str) -> Call | None:
    """The call of `op` that makes `name`, if nobody but `user` reads it."""
    made = program.producer(name)
    readers = program.consumers(name)
    return (
        made
        if made is not None and made.op == op and len(readers) == 1 and readers[0] is user
        else None
    )


def _mergeable(linears: tuple[Call, ...]) -> bool:
    """Plain linears that differ only in their own weight and bias."""
    first = linears[0]
    return all(
        call.attrs == first.attrs
        and _plain(call)
        and set(call.ins) == set(first.ins)
        and all(
            call.ins[arg] == name for arg, name in first.ins.items() if arg not in ("w", "bias")
        )
        for call in linears
    )


def _plain(linear: Call) -> bool:
    """Nothing follows the product but a bias."""
    attrs = linear.attrs
    changed = attrs["act"] or attrs["scale"] != 1.0 or attrs["softcap"]
    return not changed and "residual" not in linear.ins


class _Edit:
    """Collects what a rule removes, inserts and declares; `result` applies it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[str, Value] = {}
        self.dropped: set[int] = set()
        self.inserted: dict[int, list[Call]] = {}

    def insert(self, at: Call, call: Call) -> None:
        self.inserted.setdefault(id(at), []).append(call)

    def drop(self, *calls: Call) -> None:
        self.dropped |= {id(call) for call in calls}

    def merged_linear(
        self, linears: tuple[Call, ...], suffix: str, at: Call, out: str = "", act: str = ""
    ) -> str:
        """One linear over the rows of all weights; without `out` its result is a new temp."""
        first = linears[0]
        ins = dict(first.ins)
        for arg, tail in (("w", ""), ("bias", "_bias")):
            if arg in ins:
                ins[arg] = self._merged_weight(
                    [self.program.values[c.ins[arg]] for c in linears], suffix + tail
                )
        if not out:
            rows: Dim = self.program.values[first.outs["out"]].dims[0]
            out = f"{first.outs['out'].rsplit('.', 1)[0]}.{suffix}"
            self._declare(
                Value(name=out, dtype="float32", kind="temp", dims=(rows, self._rows(ins["w"])))
            )
        self.insert(
            at, replace(first, ins=ins, outs={"out": out}, attrs={**first.attrs, "act": act})
        )
        return out

    def _merged_weight(self, parts: list[Value], suffix: str) -> str:
        name = f"{parts[0].name.rsplit('.', 1)[0]}.{suffix}"
        rows: Dim = sum(dim for part in parts if isinstance(dim := part.dims[0], int))
        self._declare(
            replace(
                parts[0],
                name=name,
                dims=(rows, *parts[0].dims[1:]),
                parts=tuple(p.name for p in parts),
            )
        )
        return name

    def _rows(self, weight: str) -> Dim:
        return self.values[weight].dims[0]

    def _declare(self, value: Value) -> None:
        if value.name in self.program.values:
            raise ValueError(f"a fusion would declare {value.name!r} a second time")
        self.values[value.name] = value

    def result(self) -> Program:
        calls: list[Call] = []
        for call in self.program.calls:
            calls += self.inserted.get(id(call), [])
            if id(call) not in self.dropped:
                calls.append(call)
        known: Mapping[str, Value] = self.values
        return rewrite(self.program, calls, known)
