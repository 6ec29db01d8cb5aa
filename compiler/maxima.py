"""Largest numbers of rows: a linear that quantizes its rows gets them from the call that makes the
rows, so that codes can be made on the way into the product (kernels/ops/amax.py says what they
are).

`hand_on_maxima` adds them to a program whose formats are decided, wherever the call that makes rows
can write them. `without_maxima` takes them out again: every column of tiles of a product makes all
codes anew, which is more work than a launch that makes them once as soon as rows are many.
`bucket_program` says from how many on. Called by `compiler.design`.
"""

from __future__ import annotations

from dataclasses import replace

from compiler.program import Call, Program, Value, rewrite
from kernels.op import OPS
from kernels.ops.amax import WIDTH, X_AMAX, parts
from runtime.artifact import Bucket

MAXIMA_TOKENS = 256  # of the largest bucket whose products make the codes of their rows
_ARGS = (X_AMAX.name, "amax_norm", "out_amax")


def hand_on_maxima(program: Program) -> Program:
    """embed, attention, linear -> linear that quantizes: the former tells the rows' maxima."""
    given: dict[int, Call] = {id(call): call for call in program.calls}
    values: dict[str, Value] = {}
    for call in program.calls:
        out = call.outs.get("out", "")
        readers = [c for c in program.consumers(out) if _quantizes(c) and c.ins["x"] == out]
        norms = {reader.ins.get("norm") for reader in readers}
        if len(norms) != 1 or not _tells(call, norm := norms.pop()):
            continue
        rows, columns = program.values[out].dims
        assert isinstance(columns, int)
        count = parts(columns, call.attrs.get("v_head_dim", WIDTH))
        name = f"{out}.amax"
        values[name] = Value(name=name, dtype="float32", kind="temp", dims=(rows, count))
        made = given[id(call)]
        weight = {} if norm is None else {"amax_norm": norm}
        outs = {**made.outs, "out_amax": name}
        given[id(call)] = replace(made, ins={**made.ins, **weight}, outs=outs)
        for reader in readers:
            read = given[id(reader)]
            given[id(reader)] = replace(read, ins={**read.ins, X_AMAX.name: name})
    return rewrite(program, list(given.values()), values)


def without_maxima(program: Program) -> Program:
    """The program in which every linear finds the largest numbers of its rows itself."""
    calls = [
        replace(
            call,
            ins={arg: name for arg, name in call.ins.items() if arg not in _ARGS},
            outs={arg: name for arg, name in call.outs.items() if arg not in _ARGS},
        )
        for call in program.calls
    ]
    return rewrite(program, calls)


def bucket_program(program: Program, bucket: Bucket) -> Program:
    return program if bucket.tokens <= MAXIMA_TOKENS else without_maxima(program)


def _quantizes(call: Call) -> bool:
    return call.attrs.get("x_format", "") != ""


def _tells(call: Call, norm: str | None) -> bool:
    """Whether kernels of the call can write the maxima of its rows times the norm's weight: of
    linears those that quantize, too."""
    args = {arg.name for arg in OPS[call.op].args}
    return (
        "out_amax" in args
        and (norm is None or "amax_norm" in args)
        and (_quantizes(call) or "x_format" not in OPS[call.op].attrs)
    )
