"""From an op's sample to a CUDA kernel's call and memory, and back, through the interpreter.

Activations are the target's type ("float" arguments), everything else as in the contract. KV pages
have the plain order [page, 2, kv head, token, dim].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kernels.cuda.interpret import run
from kernels.cuda.kernel import CudaKernel
from kernels.cuda.layout import FORMATS, pack_linear, parse_format
from kernels.kernel import CallShape
from kernels.launch import COUNTERS, COUNTERS_BYTES, WORKSPACE, Descriptor, Pointer
from kernels.op import Op, Sample
from kernels.ops.amax import WIDTH, part_maxima
from kernels.ops.kv import KvState, layer_bytes

GROUP = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MANY_PROGRAMS = 64
GUARD = 77  # what outputs hold before a kernel runs


@dataclass(slots=True, kw_only=True)
class Case:
    """`memory`: one tensor per argument or stored field; `expected` the reference's outputs,
    `state` its state afterwards."""

    op: Op
    sample: Sample
    call: CallShape
    memory: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    state: dict[str, Any]


def matrix_formats(op: Op, sample: Sample | None = None) -> list[str]:
    if sample is not None and sample.attrs.get("x_format") == "fp8":
        return ["fp8r"]  # codes multiply codes
    if not any(a.role == "weight" and len(a.dims) >= 2 for a in op.args):
        return [""]
    named = {"int8": f"int8g{GROUP}", "int4": f"int4g{GROUP}", "fp8": "fp8r"}
    return [named.get(kind, kind) for kind in FORMATS]


def cases(op: Op, dtype: str) -> Iterator[tuple[str, Case]]:
    for sample in op.samples():
        for fmt in matrix_formats(op, sample):
            for kind in kinds(sample):
                label = " ".join(filter(None, (sample.label, fmt, dtype, kind)))
                yield label, make_case(op, sample, dtype, fmt, kind)


def kinds(sample: Sample) -> tuple[str, ...]:
    """The kinds of bucket the sample can stand in: decode too, where every sequence has one
    token."""
    start = sample.args.get("seq_start")
    if start is None:
        return ("mixed",)
    news = start[: int(sample.args["live"][1]) + 1].diff()
    return ("mixed", "decode") if bool((news == 1).all()) else ("mixed",)


def quantized(weight: torch.Tensor, fmt: str) -> tuple[Any, torch.Tensor]:
    """What `pack_linear` takes, and the values it stands for."""
    kind, group = parse_format(fmt)
    if kind == "float32":
        return weight.numpy(), weight
    if kind == "bfloat16":
        rounded = weight.bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16), rounded.float()
    if kind == "fp8":
        scale = weight.abs().amax(-1).clamp(min=1e-6) / 448
        low = (weight / scale[..., None]).to(torch.float8_e4m3fn)
        return (low.view(torch.uint8).numpy(), scale.numpy()), low.float() * scale[..., None]
    limit = 127 if kind == "int8" else 7
    groups = weight.reshape(*weight.shape[:-1], -1, group)
    scale = (groups.abs().amax(-1) / limit).clamp(min=1e-6).half().float()  # stored as float16
    q = (groups / scale[..., None]).round().clamp(-limit, limit)
    codes = q.reshape(weight.shape).to(torch.int8).numpy()
    return (codes, scale.numpy()), (q * scale[..., None]).reshape(weight.shape)


def make_case(op: Op, sample: Sample, dtype: str, fmt: str = "", kind: str = "mixed") -> Case:
    args, attrs = copy.deepcopy(sample.args), sample.attrs
    memory: dict[str, torch.Tensor] = {}
    formats: dict[str, str] = {}
    for arg in op.args:
        value = args.get(arg.name)
        if value is None:
            continue
        if isinstance(value, KvState):
            layer = value.layer(attrs)
            pool = torch.full((value.pages, attrs["page_bytes"]), 0xFF, dtype=torch.uint8)
            first, size = attrs["layer_offset"], layer_bytes(attrs)
            pool[:, first : first + size] = layer.contiguous().view(torch.uint8).flatten(1)
            memory[arg.name] = pool
        elif arg.role == "weight" and value.dim() >= 2:
            packed, args[arg.name] = quantized(value, fmt)
            for name, data in pack_linear(fmt, packed, attrs.get("act", "") == "swiglu").items():
                view = data.view(np.int16) if data.dtype == np.uint16 else data
                memory[f"{arg.name}.{name}"] = torch.from_numpy(view.copy())
            formats[arg.name] = fmt
        else:
            if arg.role == "input" and "float" in arg.dtypes:
                value = value.to(DTYPES[dtype])
                args[arg.name] = value.float()
            memory[arg.name] = value.clone()
    state = copy.deepcopy(args)
    outputs = op.outputs(sample.wanted)
    expected = {n: v for n, v in op.reference(state, attrs).items() if n in outputs}
    for name, value in expected.items():
        out = DTYPES[dtype] if "float" in op.arg(name).dtypes else value.dtype
        memory[name] = torch.full(value.shape, GUARD, dtype=out)
    named = {n: memory.get(n, v) for n, v in {**args, **expected}.items() if v is not None}
    tensors = {n: v for n, v in named.items() if isinstance(v, torch.Tensor)}
    shapes = {n: tuple(v.shape) for n, v in tensors.items()}
    shapes |= {n: (attrs["page_bytes"],) for n, v in args.items() if isinstance(v, KvState)}
    dtypes = {n: str(v.dtype).removeprefix("torch.") for n, v in tensors.items()}
    dtypes |= {n: "uint8" for n, v in args.items() if isinstance(v, KvState)}
    call = CallShape(
        op=op.name, shapes=shapes, dtypes=dtypes, formats=formats, attrs=attrs, kind=kind
    )
    return Case(op=op, sample=sample, call=call, memory=memory, expected=expected, state=state)


def programs(kernel: CudaKernel, case: Case, config: Any) -> int:
    return sum(math.prod(launch.grid) for launch in kernel.launches(case.call, config))


def quick_config(kernel: CudaKernel, case: Case) -> Any:
    """The default; where that means many programs, each of which costs a millisecond here, the
    configuration with the fewest."""
    config = kernel.default(case.call)
    if programs(kernel, case, config) <= MANY_PROGRAMS:
        return config
    return min(kernel.candidates(case.call), key=lambda c: programs(kernel, case, c))


def run_case(kernel: CudaKernel, case: Case, config: Any = None) -> torch.Tensor:
    """Runs the launches on the case's memory; counters must be zero again at the end. Returns the
    scratch as it is left."""
    config = quick_config(kernel, case) if config is None else config
    reason = kernel.valid(case.call, config)
    assert reason is None, f"{kernel.name}: {config} is not valid: {reason}"
    scratch = torch.full((max(kernel.workspace(case.call, config), 1),), 0xAB, dtype=torch.uint8)
    zeros = torch.zeros(COUNTERS_BYTES // 4, dtype=torch.int32)
    memory = {**case.memory, WORKSPACE: scratch, COUNTERS: zeros}

    def address(slot: Pointer | Descriptor) -> int:
        name = f"{slot.arg}.{slot.field}" if slot.field else slot.arg
        return memory[name].data_ptr() + slot.offset

    for launch in kernel.launches(case.call, config):
        run(launch, address)
    assert not zeros.any(), f"{kernel.name} leaves counters that are not zero"
    return scratch


def live_rows(case: Case) -> int:
    index = {"gather": 2, "sample": 2, "pool": 1}.get(case.op.name, 0)
    return int(case.sample.args["live"][case.sample.attrs.get("live_index", index)])


def check_case(case: Case, slack: float = 1.0) -> None:
    """Memory against the reference: integers exactly, floats within the op's tolerance for the
    type they are stored in."""
    rows = live_rows(case)
    for name, want in case.expected.items():
        got = case.memory[name]
        n = len(want) if case.op.arg(name).dims[0] == "E+1" else rows  # not one row per token
        close(case, name, got[:n], want[:n], slack)
        assert (got[n:] == GUARD).all(), f"{name}: rows beyond the live ones were written"
        if name == "out_amax":
            stored = case.memory["out"][:n]
            exact = part_maxima(stored, case.memory, case.call.attrs.get("v_head_dim", WIDTH))
            assert torch.equal(got[:n], exact), "maxima are not those of what is stored"
    for arg in case.op.args:
        if arg.role in ("state", "inout"):
            after = case.state[arg.name]
            if isinstance(after, KvState):
                check_kv(case, case.memory[arg.name], after)
            else:
                close(case, arg.name, case.memory[arg.name], after, slack)


def close(case: Case, name: str, got: torch.Tensor, want: torch.Tensor, slack: float) -> None:
    if not got.dtype.is_floating_point:
        assert torch.equal(got, want), f"{name}: {got} is not {want}"
        return
    dtypes = set(case.call.dtypes.values())
    low = "bfloat16" if "bfloat16" in dtypes else "float32"
    tolerance = case.op.tolerance[low] * slack
    finite = want[torch.isfinite(want)]
    scale = max(1.0, float(finite.abs().max())) if len(finite) else 1.0
    torch.testing.assert_close(
        got.float(), want.float(), rtol=0, atol=tolerance * scale, equal_nan=True, msg=None
    )


def check_kv(case: Case, pool: torch.Tensor, after: KvState) -> None:
    attrs = case.sample.attrs
    first, size = attrs["layer_offset"], layer_bytes(attrs)
    rest = torch.cat((pool[:, :first], pool[:, first + size :]), dim=1)
    assert (rest == 0xFF).all(), "bytes of other layers were written"
    want = after.layer(attrs)
    got = pool[:, first : first + size].contiguous().view(want.dtype).reshape(want.shape)
    rtol = 2**-6 if want.dtype == torch.bfloat16 else 1e-5
    if "bfloat16" in case.call.dtypes.values():
        rtol = 2**-6
    if want.dtype.itemsize == 1:
        # Inputs are the reference's: the very codes, but for values next to a rounding border
        # where something was computed before they were narrowed.
        differ = (got.view(torch.uint8) != want.view(torch.uint8)) & ~want.float().isnan()
        share = float(differ.double().mean())
        assert share == 0 or (share < 0.01 and case.op.name != "kv_write"), f"{share:%} of codes"
        rtol = 2**-2
    torch.testing.assert_close(got.float(), want.float(), rtol=rtol, atol=rtol, equal_nan=True)
