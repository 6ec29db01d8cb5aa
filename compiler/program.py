"""The program: a straight-line list of op calls over named values, the compiler's only intermediate
form.

`build` makes one, fusion rules rewrite it, `lower` binds it to kernels. It prints one call per line
and is verified before and after every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compiler.errors import ProgramError
from kernels.op import OPS, Arg, Op

Dim = int | str  # symbolic: "tokens", "seqs", "seqs+1", "pages" (width of a page-table row)

KINDS = ("weight", "state", "input", "output", "temp")
SYMBOLS = ("tokens", "seqs", "seqs+1", "pages")

ACTIVATIONS = ("float32", "bfloat16")  # what "float" in a contract may be

# Which kinds of value may stand for an argument of which role.
_ROLE_KINDS = {
    "input": ("input", "temp"),
    "weight": ("weight",),
    "state": ("state",),
    "inout": ("state",),
    "output": ("temp", "output"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """`dtype` is the element type the op sees (a quantized weight is still `float32` here; its
    storage format is decided by the quantize stage and looked up by name). `parts`: the logical
    weights whose rows, one after the other, make this one."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]
    kind: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """`ins` and `outs` map the op's argument names to value names. An `inout` argument stands in
    both with the same value."""

    op: str
    ins: Mapping[str, str]
    outs: Mapping[str, str]
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    values: Mapping[str, Value]
    calls: tuple[Call, ...]

    def consumers(self, name: str) -> list[Call]:
        return [call for call in self.calls if name in call.ins.values()]

    def producer(self, name: str) -> Call | None:
        for call in self.calls:
            if name in call.outs.values() and name not in call.ins.values():
                return call
        return None

    def weights(self) -> list[Value]:
        """Weights in the order in which a step first reads them: the load order."""
        names = dict.fromkeys(name for call in self.calls for name in call.ins.values())
        return [self.values[name] for name in names if self.values[name].kind == "weight"]


class Builder:
    """Collects values and calls; `call` declares the temps it writes and returns the first
    output's name."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.calls: list[Call] = []

    def value(self, name: str, dtype: str, dims: tuple[Dim, ...], kind: str) -> str:
        value = Value(name=name, dtype=dtype, dims=dims, kind=kind)
        if self.values.setdefault(name, value) != value:
            raise ProgramError(
                f"value {name!r} is declared as {show(self.values[name])} and as {show(value)}"
            )
        return name

    def weight(self, name: str, *dims: Dim) -> str:
        return self.value(name, "float32", dims, "weight")

    def temp(self, name: str, *dims: Dim) -> str:
        return self.value(name, "float32", dims, "temp")

    def call(
        self,
        op: str,
        ins: Mapping[str, str | None],
        out: Mapping[str, str] | str = "",
        **attrs: Any,
    ) -> str:
        """`out` is the name of the value for argument "out", or argument -> value. State
        arguments the op updates are added to the outputs by its contract; `None` inputs are
        absent optional ones."""
        present = {arg: name for arg, name in ins.items() if name is not None}
        if "live_index" in OPS[op].attrs:
            attrs.setdefault("live_index", 0)  # every token
        outs = ({"out": out} if out else {}) if isinstance(out, str) else dict(out)
        outs |= {
            a.name: present[a.name] for a in OPS[op].args if a.role == "inout" and a.name in present
        }
        self.calls.append(Call(op=op, ins=present, outs=outs, attrs=attrs))
        return next(iter(outs.values()), "")

    def build(self) -> Program:
        return verify(Program(values=dict(self.values), calls=tuple(self.calls)))


def resolve(dims: tuple[Dim, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Numbers for symbolic dims; `sizes` has tokens, seqs and pages."""
    known = {**sizes, "seqs+1": sizes["seqs"] + 1}
    return tuple(known[d] if isinstance(d, str) else d for d in dims)


def rewrite(
    program: Program, calls: list[Call], values: Mapping[str, Value] | None = None
) -> Program:
    """The program with other calls (and new values); values nobody mentions any more are
    dropped."""
    used = {name for call in calls for name in (*call.ins.values(), *call.outs.values())}
    known = {**program.values, **(values or {})}
    return Program(values={n: v for n, v in known.items() if n in used}, calls=tuple(calls))


def verify(program: Program) -> Program:
    """Returns the program, or raises ProgramError at the first broken rule: contracts kept,
    written before read, nothing written twice, nothing dead."""
    written: set[str] = set()
    used: set[str] = set()
    for name, value in program.values.items():
        _check_value(name, value)
    for index, call in enumerate(program.calls):

        def fail(message: str, index: int = index, call: Call = call) -> ProgramError:
            return ProgramError(f"call {index} ({call.op}): {message}")

        op = OPS.get(call.op)
        if op is None:
            raise fail(f"no such op; known: {', '.join(sorted(OPS))}")
        for name in (*call.ins.values(), *call.outs.values()):
            if name not in program.values:
                raise fail(f"value {name!r} is not declared")
        _check_arguments(program, call, op, fail)
        for arg, name in call.ins.items():
            if program.values[name].kind in ("temp", "output") and name not in written:
                raise fail(f"{arg} reads {name!r} before anything writes it")
            used.add(name)
        for arg, name in call.outs.items():
            if name in call.ins.values():
                continue  # inout
            if name in written:
                raise fail(f"{arg} writes {name!r} a second time")
            written.add(name)
    for value in program.values.values():
        if value.kind == "output" and value.name not in written:
            raise ProgramError(f"output {value.name!r} is never written")
        if value.kind != "output" and value.name not in used:
            raise ProgramError(f"{value.kind} {value.name!r} is never read")
    return program


def _check_value(name: str, value: Value) -> None:
    if value.name != name or value.kind not in KINDS:
        raise ProgramError(f"value {name!r} is declared as {show(value)}")
    for dim in value.dims:
        if dim not in SYMBOLS and not (isinstance(dim, int) and dim > 0):
            raise ProgramError(
                f"value {show(value)} has the dimension {dim!r}; "
                f"symbolic ones are {', '.join(SYMBOLS)}"
            )


def _check_arguments(
    program: Program, call: Call, op: Op, fail: Callable[[str], ProgramError]
) -> None:
    bound: dict[str, Dim] = {}
    for arg in op.args:
        takes, gives = arg.role != "output", arg.role in ("output", "inout")
        for side, wanted in ((call.ins, takes), (call.outs, gives)):
            if wanted and not arg.optional and arg.name not in side:
                raise fail(f"argument {arg.name!r} is missing")
            if not wanted and arg.name in side:
                raise fail(
                    f"argument {arg.name!r} has the role {arg.role} and stands on the wrong side"
                )
        if arg.role == "inout" and call.ins.get(arg.name) != call.outs.get(arg.name):
            raise fail(
                f"{arg.name!r} is updated in place but reads {call.ins.get(arg.name)!r} "
                f"and writes {call.outs.get(arg.name)!r}"
            )
        name = call.ins.get(arg.name, call.outs.get(arg.name))
        if name is not None:
            _check_argument(arg, program.values[name], bound, fail)
    known = {arg.name for arg in op.args}
    if unknown := sorted({*call.ins, *call.outs} - known):
        raise fail(f"no argument {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if set(call.attrs) != set(op.attrs):
        raise fail(f"attributes are {sorted(call.attrs)}, the contract has {sorted(op.attrs)}")
    for key, kind in op.attrs.items():
        if type(call.attrs[key]) is not kind:
            raise fail(f"attribute {key} is {call.attrs[key]!r}, expected {kind.__name__}")


def _check_argument(
    arg: Arg, value: Value, bound: dict[str, Dim], fail: Callable[[str], ProgramError]
) -> None:
    if value.kind not in _ROLE_KINDS[arg.role]:
        raise fail(f"{arg.name} ({arg.role}) is given {show(value)}")
    if value.dtype not in arg.dtypes and not ("float" in arg.dtypes and value.dtype in ACTIVATIONS):
        raise fail(
            f"{arg.name} has the dtype {value.dtype}, expected one of {', '.join(arg.dtypes)}"
        )
    if len(value.dims) != len(arg.dims):
        raise fail(f"{arg.name} is {show(value)}, expected axes {', '.join(arg.dims)}")
    for axis, dim in zip(arg.dims, value.dims, strict=True):
        if axis.isdigit():
            expected: Dim = int(axis)
        else:
            expected = axis if axis in SYMBOLS else bound.setdefault(axis, dim)
        if dim != expected:
            raise fail(f"{arg.name} is {show(value)}: axis {axis} is {dim}, expected {expected}")


def show(value: Value) -> str:
    return f"{value.name}: {value.kind} {value.dtype}[{', '.join(map(str, value.dims))}]"


def render(program: Program) -> str:
    """One line per value that comes from outside, one per call; the same program always prints
    the same text."""
    lines = [
        f"{value.kind:6} {value.name} {value.dtype}[{', '.join(map(str, value.dims))}]"
        + (f" = {' + '.join(value.parts)}" if value.parts else "")
        for value in sorted(program.values.values(), key=lambda v: (KINDS.index(v.kind), v.name))
        if value.kind != "temp"
    ]
    for call in program.calls:
        fresh = {arg: name for arg, name in call.outs.items() if arg not in call.ins}
        left = ", ".join(
            f"{n}[{', '.join(map(str, program.values[n].dims))}]" for n in fresh.values()
        )
        args = ", ".join(
            f"{arg}={'&' if arg in call.outs else ''}{name}" for arg, name in call.ins.items()
        )
        attrs = "".join(f" {key}={value!r}" for key, value in sorted(call.attrs.items()))
        lines.append(f"{left}{' = ' if left else ''}{call.op}({args}){attrs}")
    return "\n".join(lines) + "\n"
