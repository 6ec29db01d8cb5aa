"""From an op's sample to a kernel's call and arrays, and back: torch on one side, numpy and packed
layouts on the other.

Used by the tests that run every kernel on every sample of its op.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kernels.cpu.layout import FORMAT_CODES, pack_kv, pack_linear, parse_format, unpack_kv
from kernels.kernel import CallShape
from kernels.op import Op, Sample
from kernels.ops.kv import KvState, layer_bytes

GROUP = 32
GATED = ("swiglu", "geglu", "geglu_tanh", "swiglu_clamped")  # their weights are cat(gate, up)


@dataclass(slots=True, kw_only=True)
class Case:
    """A sample as a kernel sees it. `expected` are the reference's outputs, `state` the
    reference's state afterwards."""

    op: Op
    sample: Sample
    call: CallShape
    arrays: dict[str, Any]
    expected: dict[str, torch.Tensor]
    state: dict[str, Any]


def formats(op: Op) -> list[str]:
    """Storage formats worth testing: one per kind when the op has a matrix weight."""
    if not any(a.role == "weight" and len(a.dims) > 1 for a in op.args):
        return [""]
    return [f"{kind}g{GROUP}" if kind.startswith("int") else kind for kind in FORMAT_CODES]


def cases(op: Op) -> Iterator[tuple[str, Case]]:
    for sample in op.samples():
        for fmt in formats(op):
            yield f"{sample.label} {fmt}".strip(), make_case(op, sample, fmt)


def _stored(
    weight: torch.Tensor, fmt: str, gated: bool
) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """Packed fields of a weight, and the values they stand for."""
    kind, group = parse_format(fmt)
    if kind == "float32":
        return pack_linear(fmt, weight.numpy(), gated), weight
    if kind.startswith("bfloat16"):
        rounded = weight.bfloat16()
        return pack_linear(
            fmt, rounded.view(torch.int16).numpy().view(np.uint16), gated
        ), rounded.float()
    limit = 127 if kind == "int8" else 7
    groups = weight.unflatten(-1, (-1, group))
    scale = (groups.abs().amax(-1) / limit).clamp(min=1e-6).half().float()  # stored as float16
    q = (groups / scale[..., None]).round().clamp(-limit, limit)
    packed = pack_linear(
        fmt, (q.reshape(weight.shape).to(torch.int8).numpy(), scale.numpy()), gated
    )
    return packed, (q * scale[..., None]).reshape(weight.shape)


def make_case(op: Op, sample: Sample, fmt: str = "") -> Case:
    args, attrs = copy.deepcopy(sample.args), sample.attrs
    arrays: dict[str, Any] = {}
    stored: dict[str, str] = {}
    gated = attrs.get("act", "") in GATED
    for arg in op.args:
        value = args.get(arg.name)
        if value is None:
            continue
        if isinstance(value, KvState):
            pool = np.full((value.pages, attrs["page_bytes"]), 0xFF, np.uint8)
            place = np.s_[:, attrs["layer_offset"] : attrs["layer_offset"] + layer_bytes(attrs)]
            if "latent" in attrs:  # stored as it is
                pool[place] = layer_bits(value.layer(attrs)).view(np.uint8).reshape(value.pages, -1)
            else:
                pool[place] = pack_kv(*(layer_bits(part) for part in value.keys_and_values(attrs)))
            arrays[arg.name] = pool
        elif arg.role == "weight" and len(arg.dims) > 1:
            packed, args[arg.name] = _stored(value, fmt, gated)
            arrays |= {f"{arg.name}.{field}": data for field, data in packed.items()}
            stored[arg.name] = fmt
        else:
            arrays[arg.name] = value.numpy().copy()
    state = copy.deepcopy(args)
    outputs = op.outputs(sample.wanted)
    expected = {n: v for n, v in op.reference(state, attrs).items() if n in outputs}
    shapes = {n: tuple(v.shape) for n, v in args.items() if isinstance(v, torch.Tensor)}
    dtypes = {
        n: str(v.dtype).removeprefix("torch.")
        for n, v in args.items()
        if isinstance(v, torch.Tensor)
    }
    for name, value in expected.items():
        arrays[name] = np.full_like(value.numpy(), 77)
        shapes[name], dtypes[name] = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    call = CallShape(op=op.name, shapes=shapes, dtypes=dtypes, formats=stored, attrs=attrs)
    return Case(op=op, sample=sample, call=call, arrays=arrays, expected=expected, state=state)


def layer_bits(layer: torch.Tensor) -> np.ndarray:
    """float32 as it is, narrower values as unsigned bits."""
    if layer.dtype == torch.bfloat16:
        return layer.view(torch.int16).numpy().view(np.uint16)
    return layer.view(torch.uint8).numpy() if layer.dtype.itemsize == 1 else layer.numpy()


def live_rows(case: Case, name: str) -> int:
    """Rows of an output that exist."""
    rows = case.op.arg(name).dims[0]
    if rows not in ("tokens", "seqs", "R"):
        return len(case.expected[name])
    per_row = rows == "seqs" or case.sample.attrs.get("live_index") == 2
    return int(case.sample.args["live"][2 if per_row else 0])


def check_case(case: Case, slack: float = 1.0) -> None:
    """The arrays a kernel left against the reference; integers exactly, floats within the op's
    tolerance."""
    for name, value in case.expected.items():
        n = live_rows(case, name)
        _close(case, name, case.arrays[name][:n], value[:n].numpy(), slack)
        if n < len(value):
            assert (case.arrays[name][n:] == 77).all(), (
                f"{name}: rows beyond the live ones were written"
            )
    for arg in case.op.args:
        if arg.role != "state":
            continue
        after = case.state[arg.name]
        if isinstance(after, KvState):
            _check_kv(case, case.arrays[arg.name], after, slack)
        else:
            _close(case, arg.name, case.arrays[arg.name], after.numpy(), slack)


def _close(case: Case, name: str, got: np.ndarray, want: np.ndarray, slack: float) -> None:
    if got.dtype != np.float32:
        np.testing.assert_array_equal(got, want, err_msg=name)
        return
    tolerance = case.op.tolerance["float32"] * slack
    finite = want[np.isfinite(want)]
    scale = max(1.0, float(np.abs(finite).max(initial=0.0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale, err_msg=name)


def _check_kv(case: Case, pool: np.ndarray, after: KvState, slack: float) -> None:
    attrs = case.sample.attrs
    first, size = attrs["layer_offset"], layer_bytes(attrs)
    others = np.delete(pool, np.s_[first : first + size], axis=1)
    assert (others == 0xFF).all(), "bytes of other layers were written"
    want = after.layer(attrs)
    dtype = str(layer_bits(want).dtype)
    layer = pool[:, first : first + size]
    if "latent" in attrs:
        got = np.ascontiguousarray(layer).view(dtype).reshape(tuple(want.shape))
    else:
        parts = unpack_kv(layer, attrs["kv_heads"], attrs["page_size"], attrs["head_dim"], dtype)
        got = np.concatenate([part.reshape(len(pool), -1) for part in parts], axis=1)
    if dtype == "uint8" and case.op.name == "kv_write":  # nothing is computed: the very codes
        assert np.array_equal(got, layer_bits(want)), "codes differ"
    signed = got.view(np.int16) if dtype == "uint16" else got
    tensor = torch.from_numpy(signed).view(want.dtype)
    # a value next to a rounding border may fall either way
    rtol = {"uint16": 2**-7, "uint8": 2**-2}.get(dtype, 1e-5)
    atol = 1e-5 if slack == 1 else case.op.tolerance["float32"] * slack
    torch.testing.assert_close(tensor.float(), want.float(), rtol=rtol, atol=atol, equal_nan=True)
    if dtype == "uint8" and slack == 1:
        assert (got != layer_bits(want)).mean() < 0.01, "more than borders differ"


def with_args(sample: Sample, **changes: Any) -> Sample:
    return replace(sample, args={**sample.args, **changes})
