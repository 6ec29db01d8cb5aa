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
    """Makes the interpreter compute bfloat16 as devices do, run on numpy >= 2.4 and leave the
    language patched, once per process.

    Upstream multiplies the bit patterns of bfloat16 and truncates on conversion (triton issues
    11584, 11604); here values are widened to float32, computed, and rounded to nearest even.
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
        if kind.primitive_bitwidth == 8 and kind.is_floating():
            raw = interpreter._convert_float(value.data, kind, tl.float32, None)
            return raw.view(np.float32).reshape(value.data.shape)
        return value.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if any(
            x.dtype.scalar in (tl.bfloat16, tl.float16)
            or (x.dtype.scalar.primitive_bitwidth == 8 and x.dtype.scalar.is_floating())
            for x in (a, b)
        ):
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
        kinds = (source.dtype.scalar, target.scalar)
        if tl.bfloat16 in kinds and 8 not in (k.primitive_bitwidth for k in kinds):
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
