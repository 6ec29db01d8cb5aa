"""Element types of a target: temps that hold activations get the activation type.

Comes in: a fused program (every temp float32) and a dtype. Goes out: the program as a CUDA device
computes it. A temp keeps float32 where any contract that writes or reads it asks for float32 alone
(angles, logits, routing weights).
"""

from __future__ import annotations

from dataclasses import replace

from compiler.program import Program
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
