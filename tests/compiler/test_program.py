"""The verifier refuses every broken program with the call and the value named; printing is
stable.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_specs import SHAPE, toy

from compiler.errors import ProgramError
from compiler.model import build
from compiler.program import Program, Value, render, resolve, verify

PROGRAM = build(toy("llama", layers=1), SHAPE)


def index_of(op: str) -> int:
    return next(i for i, call in enumerate(PROGRAM.calls) if call.op == op)


def edited(name: str, /, **changes: object) -> Program:
    """The program with one call changed."""
    at = index_of(name)
    calls = list(PROGRAM.calls)
    calls[at] = replace(calls[at], **changes)
    return replace(PROGRAM, calls=tuple(calls))


def with_value(value: Value) -> Program:
    return replace(PROGRAM, values={**PROGRAM.values, value.name: value})


def test_the_built_program_is_sound() -> None:
    assert verify(PROGRAM) is PROGRAM


def test_resolve() -> None:
    sizes = {"tokens": 8, "seqs": 3, "pages": 2}
    assert resolve(("tokens", 5, "seqs+1", "pages"), sizes) == (8, 5, 4, 2)


def swapped() -> Program:
    at = index_of("add")
    calls = list(PROGRAM.calls)
    calls[at - 1], calls[at] = calls[at], calls[at - 1]
    return replace(PROGRAM, calls=tuple(calls))


def written_twice() -> Program:
    at = index_of("add")
    calls = (*PROGRAM.calls[: at + 1], PROGRAM.calls[at], *PROGRAM.calls[at + 1 :])
    return replace(PROGRAM, calls=calls)


NORM = PROGRAM.calls[index_of("rms_norm")]
BROKEN = {
    "no such op": lambda: edited("add", op="sub"),
    "not declared": lambda: edited("rms_norm", ins={**NORM.ins, "x": "nowhere"}),
    "argument 'w' is missing": lambda: edited("rms_norm", ins={"live": "live", "x": "h"}),
    "no argument 'bias'": lambda: edited("rms_norm", ins={**NORM.ins, "bias": "h"}),
    "before anything writes it": swapped,
    "a second time": written_twice,
    "is never read": lambda: with_value(
        Value(name="spare", dtype="float32", dims=(4,), kind="weight")
    ),
    "is never written": lambda: with_value(
        Value(name="spare", dtype="float32", dims=(4,), kind="output")
    ),
    "expected float": lambda: edited("rms_norm", attrs={"eps": 1, "live_index": 0}),
    "the contract has": lambda: edited("rms_norm", attrs={}),
    "axis D is 65, expected 64": lambda: with_value(
        replace(PROGRAM.values["layers.0.attn_norm"], dims=(65,))
    ),
    "expected tokens": lambda: with_value(replace(PROGRAM.values["h"], dims=("seqs", 64))),
    "has the dtype int32": lambda: with_value(replace(PROGRAM.values["h"], dtype="int32")),
    "(weight) is given": lambda: edited("rms_norm", ins={**NORM.ins, "w": "h"}),
    "symbolic ones are": lambda: with_value(replace(PROGRAM.values["h"], dims=("rows", 64))),
    "wrong side": lambda: edited("rms_norm", ins={**NORM.ins, "out": "h"}),
    "is declared as": lambda: with_value(replace(PROGRAM.values["h"], kind="scratch")),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_programs_are_refused(message: str) -> None:
    with pytest.raises(ProgramError) as error:
        verify(BROKEN[message]())
    assert message in str(error.value)


def test_render_is_deterministic_and_has_a_line_per_call() -> None:
    text = render(PROGRAM)
    assert text == render(build(toy("llama", layers=1), SHAPE))
    assert sum(" = " in line or "(" in line for line in text.splitlines()) == len(PROGRAM.calls)
