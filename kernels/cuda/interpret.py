"""Runs launches on CPU memory with Triton's interpreter: the very kernels, grids and addresses of a
plan, without a GPU.

In: a launch and the address of each slot. Out: the memory the kernel left. The process must have
set TRITON_INTERPRET=1 before triton was first imported. Used by kernel tests and by the executing
plan check.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from kernels.launch import Constant, Descriptor, Launch, Number, Pointer, Slot

Address = Callable[[Pointer | Descriptor], int]


def run(launch: Launch, address: Address) -> None:
    """Executes every program of the launch's grid, one after the other."""
    assert launch.source is not None, "a launch of the CPU target has no Triton source"
    values: dict[str, Slot | Constant] = {**launch.slots, **dict(launch.source.constants)}
    execute(launch.source.function, launch.grid, values, address)


def execute(
    function: str,
    grid: tuple[int, int, int],
    values: Mapping[str, Slot | Constant],
    address: Address,
) -> None:
    """`function` as in `Source`; `values` by parameter name."""
    module, _, name = function.rpartition(".")
    jitted = getattr(importlib.import_module(f"kernels.cuda.code.{module}"), name)
    prepare()
    from triton.runtime.interpreter import interpreter_builder

    python = jitted.rewrite()
    annotations = jitted.fn.__annotations__
    arguments = {
        key: _argument(value, address, "constexpr" in str(annotations.get(key)))
        for key, value in values.items()
    }
    interpreter_builder.set_grid_dim(*grid)
    for x in range(grid[0]):
        for y in range(grid[1]):
            for z in range(grid[2]):
                interpreter_builder.set_grid_idx(x, y, z)
                python(**arguments)


def _argument(value: Slot | Constant, address: Address, constant: bool) -> Any:
    import triton.language as tl
    from triton.runtime import interpreter

    def scalar(number: int | float, type: str, dtype: Any) -> Any:
        kind = tl.str_to_ty(type, None)
        return tl.tensor(interpreter.TensorHandle(np.array([number], dtype), kind), kind)

    if isinstance(value, Pointer):
        return scalar(address(value), f"*{value.type}", np.uint64)
    if isinstance(value, Number):
        dtypes = {"i32": np.int32, "i64": np.int64, "fp32": np.float32, "fp64": np.float64}
        return scalar(value.value, value.type, dtypes[value.type])
    if isinstance(value, Descriptor):
        semantic = tl.semantic.TritonSemantic(interpreter.InterpreterBuilder())
        strides = [scalar(s, "i64", np.int64) for s in value.strides[:-1]]
        return semantic.make_tensor_descriptor(
            base=scalar(address(value), f"*{value.type}", np.uint64),
            shape=[scalar(s, "i32", np.int32) for s in value.shape],
            strides=[*strides, tl.constexpr(1)],
            block_shape=[tl.constexpr(b) for b in value.block],
            padding_option="zero",
        )
    if constant or value is None or not isinstance(value, int | float):
        return value
    return interpreter._implicit_cvt(value)


@cache
def prepare() -> None:
    """Makes the interpreter compute bfloat16 and convert fp8 as devices do, run on numpy >= 2.4 and
    leave the language patched, once per process.

    Upstream multiplies the bit patterns of bfloat16, truncates on conversion and rounds some values
    of fp8 wrongly (triton issues 11584, 11604); here values are widened to float32, computed, and
    rounded to nearest even. fp8 saturates as the device's instruction does (cvt.rn.satfinite).
    """
    import triton
    import triton.language as tl
    import triton.language.extra.cuda as extra
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "Triton is not interpreting in this process: set TRITON_INTERPRET=1 before it starts"
        )
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, binary, convert = builder.cast_impl, builder.binary_op, builder.create_fp_to_fp
    dot, patch_tensor = builder.create_dot, interpreter._patch_lang_tensor

    def wide(value: Any) -> Any:
        kind = value.dtype.scalar
        if kind == tl.bfloat16:
            return _up(value.data)
        if fp8(kind):
            return fp8_values(kind.fp_mantissa_width, kind.exponent_bias)[value.data]
        return value.data

    def fp8(kind: Any) -> bool:
        return bool(kind.primitive_bitwidth == 8 and kind.is_floating())

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if any(x.dtype.scalar in (tl.bfloat16, tl.float16) or fp8(x.dtype.scalar) for x in (a, b)):
            x, y = (wide(v).astype(np.float32, copy=False) for v in (a, b))
            product = np.matmul(x, y).astype(d.data.dtype, copy=False)
            return handle(product + d.data, d.dtype.scalar)
        return dot(self, a, b, d, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        a, b = source.dtype.scalar, target.scalar
        if tl.bfloat16 not in (a, b) or a == b:
            return cast(self, source, target)
        if a == tl.bfloat16:
            widened = handle(_up(source.data), tl.float32)
            return widened if b == tl.float32 else cast(self, widened, target)
        narrow = source if a == tl.float32 else cast(self, source, tl.float32)
        return handle(_down(narrow.data), tl.bfloat16)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16 and left.data.dtype == np.uint16:
            result = op(_up(left.data), _up(right.data))
            if result.dtype == np.float32:
                return handle(_down(result), tl.bfloat16)
            return handle(result, tl.int1)
        return binary(self, left, right, op)

    def create_fp_to_fp(self: Any, source: Any, target: Any, mode: Any) -> Any:
        a, b = source.dtype.scalar, target.scalar
        if fp8(a) and not fp8(b):
            widened = handle(wide(source), tl.float32)
            return widened if b == tl.float32 else self.cast_impl(widened, target)
        if fp8(b) and a == tl.float32:
            table = fp8_values(b.fp_mantissa_width, b.exponent_bias)
            return handle(to_fp8(source.data, table), b)
        if tl.bfloat16 in (a, b):
            return self.cast_impl(source, target)
        return convert(self, source, target, mode)

    def patch(tensor: Any, scope: Any, *rest: Any) -> None:
        patch_tensor(tensor, scope, *rest)
        index = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])  # noqa: E731
        scope.set_attr(tensor, "__index__", index)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        # Upstream patches the language again at every call of a device function.
        return self.rewrite()(*arguments, **named)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.binary_op, builder.create_fp_to_fp = binary_op, create_fp_to_fp
    interpreter._patch_lang_tensor = patch
    interpreter.InterpretedFunction.__call__ = call
    for name in ("gdc_wait", "gdc_launch_dependents"):  # launches run one after the other here
        setattr(extra, name, lambda *_, **__: None)
    language = type("Language", (), {"__globals__": {"tl": tl, "core": tl.core}})
    _KEEP.append(interpreter._patch_lang(language))


_KEEP: list[Any] = []  # the patch scope: restored when collected, so it lives with the process


def _up(bits: Any) -> Any:
    """bfloat16 bits -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _down(x: Any) -> Any:
    """float32 -> bfloat16 bits, to nearest even, NaN kept."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


@cache
def fp8_values(mantissa: int, bias: int) -> Any:
    """float32 of every code of e4m3 (no infinity, NaN is all ones) or e5m2 (IEEE)."""
    code = np.arange(256)
    exponent, fraction = (code & 127) >> mantissa, code & ((1 << mantissa) - 1)
    unit = np.ldexp(1.0, np.maximum(exponent, 1) - bias - mantissa)
    value = (fraction + ((exponent > 0) << mantissa)) * unit
    top = exponent == (127 >> mantissa)
    if mantissa == 2:
        value = np.where(top, np.where(fraction == 0, np.inf, np.nan), value)
    else:
        value = np.where(top & (fraction == 7), np.nan, value)
    return np.where(code >= 128, -value, value).astype(np.float32)


def to_fp8(x: Any, values: Any) -> Any:
    """float32 -> codes of the table, to nearest even, saturating, NaN kept."""
    finite = values[:128][np.isfinite(values[:128])].astype(np.float64)
    borders = (finite[:-1] + finite[1:]) / 2
    below = np.searchsorted(borders, np.abs(x), "left")  # of two neighbours at a tie
    above = np.searchsorted(borders, np.abs(x), "right")
    code = np.where(below % 2 == 0, below, above) | np.where(np.signbit(x), 128, 0)
    return np.where(np.isnan(x), 127, code).astype(np.uint8)
