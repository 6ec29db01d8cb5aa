"""Number formats of a program: temps that hold activations get the target's type, linears with
quantized weights the format their inputs are quantized to.

Comes in: a fused program (every temp float32), a dtype, the weights' storage formats. Goes out: the
program as the device computes it. A temp keeps float32 where any contract that writes or reads it
asks for float32 alone (angles, logits, routing weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from compiler.program import Program
from compiler.quantize.scheme import parse_format
from kernels.op import OPS


def activations(program: Program, dtype: str) -> Program:
    """`dtype`: float32 or bfloat16."""
    kept = {
        name
        for call in program.calls
        for arg, name in (*call.ins.items(), *call.outs.items())
        if "float" not in OPS[call.op].arg(arg).dtypes
    }
    values = {
        name: replace(value, dtype=dtype)
        if value.kind == "temp" and value.dtype == "float32" and name not in kept
        else value
        for name, value in program.values.items()
    }
    return Program(values=values, calls=program.calls)


def linear_inputs(program: Program, formats: Mapping[str, str], x_format: str) -> Program:
    """Linears of quantized weights quantize their inputs to `x_format` ("": they do not). Stacks of
    experts and of heads have ops of their own and never do. `formats` of the logical weights."""

    def quantized(weight: str) -> bool:
        parts = program.values[weight].parts or (weight,)
        return parse_format(formats.get(parts[0], "float32")) is not None

    calls = tuple(
        replace(call, attrs={**call.attrs, "x_format": x_format})
        if "x_format" in call.attrs and quantized(call.ins["w"])
        else call
        for call in program.calls
    )
    return Program(values=program.values, calls=calls)
