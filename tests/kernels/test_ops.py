"""The references of the ops against formulas written another way: dense torch functions, complex
numbers, plain loops."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels.ops.register  # noqa: F401
from kernels.op import OPS, Op, Sample
from kernels.ops import attention, embed, linear, mlp, norm, rope, sample, state
from kernels.ops.kv import KvState


def run(op: Op, s: Sample) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    args = copy.deepcopy(s.args)
    return op.reference(args, s.attrs), args


def pick(op: Op, label: str) -> Sample:
    return next(s for s in op.samples() if s.label == label)


@pytest.mark.parametrize("name", sorted(OPS))
def test_contract(name: str) -> None:
    """Samples fit the argument list, outputs the declared ones, and dead rows are never read
    (they are NaN)."""
    op = OPS[name]
    outputs = {a.name for a in op.args if a.role == "output"}
    required = {a.name for a in op.args if a.role != "output" and not a.optional}
    samples = op.samples()
    assert samples
    for s in samples:
        assert required <= set(s.args) <= {a.name for a in op.args}
        assert set(s.attrs) <= set(op.attrs)
        out, _ = run(op, s)
        assert set(out) == outputs
        for n, v in out.items():
            if n not in ("logprob", "top_logprobs"):
                assert bool(torch.isfinite(v.float()).all()), (s.label, n)
        shapes = {
            n: tuple(v.shape) for n, v in {**s.args, **out}.items() if isinstance(v, torch.Tensor)
        }
        cost = op.cost(shapes, s.attrs)
        assert cost.read + cost.written > 0 and cost.flops >= 0
        assert cost.written >= sum(4 * v.numel() for v in out.values() if v.is_floating_point())
    again = op.samples()
    assert [s.label for s in again] == [s.label for s in samples]
    assert all(
        torch.equal(torch.nan_to_num(a.args[n].float()), torch.nan_to_num(b.args[n].float()))
        for a, b in zip(samples, again, strict=True)
        for n in a.args
        if isinstance(a.args[n], torch.Tensor)
    ), "samples are not deterministic"


def test_embed_reads_the_last_token_of_a_slot() -> None:
    s = pick(embed.EMBED, "partial")
    out, _ = run(embed.EMBED, s)
    table, last = s.args["table"], s.args["last_token"]
    wanted = [0, 82, int(last[0]), int(last[3]), 7]
    torch.testing.assert_close(out["out"][:5], table[wanted] * 2.5)


def test_norms() -> None:
    s = pick(norm.RMS_NORM, "partial")
    x, w = s.args["x"][:3], s.args["w"]
    torch.testing.assert_close(run(norm.RMS_NORM, s)[0]["out"][:3], F.rms_norm(x, (576,), w, 1e-5))
    s = pick(norm.HEAD_NORM, "partial")
    x = s.args["x"][:3].view(3, 3, 48)
    want = F.rms_norm(x, (48,), s.args["w"], 1e-6).flatten(1)
    torch.testing.assert_close(run(norm.HEAD_NORM, s)[0]["out"][:3], want)
    s = pick(norm.HEAD_NORM, "layer norms")
    x = F.layer_norm(s.args["x"][:3].view(3, 5, 48), (48,), eps=1e-6)
    want = (x * s.args["w"].view(5, 48)).flatten(1)
    torch.testing.assert_close(run(norm.HEAD_NORM, s)[0]["out"][:3], want)
    s = pick(norm.LAYER_NORM, "partial")
    want = F.layer_norm(s.args["x"][:3], (576,), s.args["w"], s.args["bias"], 1e-5)
    torch.testing.assert_close(run(norm.LAYER_NORM, s)[0]["out"][:3], want)
    s = pick(norm.RMS_NORM, "residual")
    want = F.rms_norm(s.args["x"][:3], (96,), s.args["w"], 1e-6) + s.args["residual"][:3]
    torch.testing.assert_close(run(norm.RMS_NORM, s)[0]["out"][:3], want)


def by_formula(act: str, x: np.ndarray) -> np.ndarray:
    """Activations from their definitions, in float64."""
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return {
        "silu": x / (1 + np.exp(-x)),
        "gelu": x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2,
        "gelu_tanh": x / 2 * (1 + tanh),
        "relu": np.maximum(x, 0),
        "relu2": np.maximum(x, 0) ** 2,
    }[act]


def by_row_e4m3(x: np.ndarray) -> np.ndarray:
    """Each number of a row as the nearest e4m3 number of the row, whose largest stands for 448."""
    finite = [b for b in range(256) if b & 0x7F != 0x7F]
    numbers = np.sort(np.unique([e4m3_number(b) for b in finite]))
    assert numbers[-1] == 448 and len(numbers) == 253  # both zeros are one
    scale = np.abs(x).max(axis=1, initial=0, keepdims=True) / 448
    scale[scale == 0] = 1
    return numbers[np.abs((x / scale)[..., None] - numbers).argmin(-1)] * scale


def e4m3_number(bits: int) -> float:
    """By the format's definition (Micikevicius et al. 2022): sign, 4 bits of exponent with bias 7,
    3 of mantissa."""
    sign, exponent, mantissa = -1.0 if bits & 0x80 else 1.0, bits >> 3 & 15, bits & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def test_codes_and_scales_are_those_of_torchao() -> None:
    from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 3
    codes, scale = linear.e4m3_rows(x)
    wanted = _choose_scale_float8(x, [1, 256])
    assert torch.equal(scale, wanted[:, 0])
    ours = codes.view(torch.uint8)
    assert torch.equal(ours, _quantize_affine_float8(x, wanted).view(torch.uint8))
    zeros, one = linear.e4m3_rows(torch.zeros(2, 16))
    assert not zeros.float().any() and bool((one > 0).all())


@pytest.mark.parametrize("s", linear.LINEAR.samples(), ids=lambda s: s.label)
def test_linear(s: Sample) -> None:
    a = {n: v.double().numpy() for n, v in s.args.items()}
    n = int(s.args["live"][s.attrs["live_index"]])
    x = a["x"][a["rows"][:n].astype(int)] if "rows" in a else a["x"][:n]
    if "norm" in a:
        x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + s.attrs["eps"]) * a["norm"]
    if s.attrs["x_format"] == "fp8":
        x = by_row_e4m3(x)
    y = np.einsum("rk,nk->rn", x, a["w"]) + a.get("bias", 0.0)
    if act := mlp.GATED.get(s.attrs["act"]):
        half = y.shape[1] // 2
        y = by_formula(act, y[:, :half]) * y[:, half:]
    elif s.attrs["act"]:
        y = by_formula(s.attrs["act"], y)
    y = y * s.attrs["scale"]
    if cap := s.attrs["softcap"]:
        y = cap * np.tanh(y / cap)
    if "residual" in a:
        chosen = a["residual_rows"][:n].astype(int) if "residual_rows" in a else slice(n)
        y = y + a["residual"][chosen]
    np.testing.assert_allclose(run(linear.LINEAR, s)[0]["out"][:n].numpy(), y, atol=5e-5)


@pytest.mark.parametrize("act", [*mlp.GATED, *mlp.ACTIVATIONS])
def test_activations(act: str) -> None:
    op = mlp.GATED_OP if act in mlp.GATED else mlp.ACTIVATION
    s = pick(op, f"odd {act}")
    x = {n: v.double().numpy() for n, v in s.args.items()}
    want = by_formula(mlp.GATED[act], x["gate"]) * x["up"] if "up" in x else by_formula(act, x["x"])
    np.testing.assert_allclose(run(op, s)[0]["out"].numpy(), want, rtol=1e-5, atol=1e-6)


def test_add_and_clip() -> None:
    s = pick(mlp.CLIP, "odd 1.5")
    x = s.args["x"]
    want = torch.where(x.abs() > 1.5, 1.5 * x.sign(), x)
    torch.testing.assert_close(run(mlp.CLIP, s)[0]["out"], want)
    s = pick(mlp.ADD, "odd")
    torch.testing.assert_close(run(mlp.ADD, s)[0]["out"], s.args["a"] + s.args["b"])


def turn(x: np.ndarray, angle: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rotation of pairs as multiplication by exp(i angle)."""
    half = angle.shape[-1]
    a, b = (
        (x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2])
        if interleaved
        else (x[..., :half], x[..., half : 2 * half])
    )
    z = (a + 1j * b) * np.exp(1j * angle)
    out = x.copy()
    if interleaved:
        out[..., : 2 * half : 2], out[..., 1 : 2 * half : 2] = z.real, z.imag
    else:
        out[..., :half], out[..., half : 2 * half] = z.real, z.imag
    return out


@pytest.mark.parametrize("start", [0, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_complex_rotation(interleaved: bool, start: int) -> None:
    heads, dim, rotary = 3, 32, 24
    positions = torch.tensor([0, 5, 300], dtype=torch.int32)
    freq = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    live = torch.tensor([3, 0, 0, 0, 0, 0, 0, 0], dtype=torch.int32)
    args = {"live": live, "positions": positions, "inv_freq": freq}
    table = rope.rope_table_reference(args, {"scale": 1.0, "variants": 1})["out"]
    x = torch.randn(3, heads * dim, generator=torch.Generator().manual_seed(0))
    attrs = {"heads": heads, "head_dim": dim, "start": start, "interleaved": interleaved}
    got = rope.rope_reference({"live": live, "x": x, "table": table}, attrs)["out"]
    angle = positions.double().numpy()[:, None, None] * freq.double().numpy()
    want = x.double().numpy().reshape(3, heads, dim)
    want[..., start:] = turn(want[..., start:], angle, interleaved)
    np.testing.assert_allclose(got.numpy(), want.reshape(3, -1), atol=5e-5)


def by_definition(
    s: Sample, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """One query and head at a time, from the formulas of the op's docstring; q [H, T, E]."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype)
    length = k.shape[1]
    sinks, slopes = s.args.get("sinks"), s.args.get("alibi")
    for head in range(q.shape[0]):
        for row in range(q.shape[1]):
            i = length - q.shape[1] + row
            keys = mask[row].nonzero().flatten()
            score = k[head, keys] @ q[head, row] * s.attrs["scale"]
            if s.attrs["logn"] and i + 1 > s.attrs["logn"]:
                score = score * math.log(i + 1, s.attrs["logn"])
            if cap := s.attrs["softcap"]:
                score = cap * (score / cap).tanh()
            if slopes is not None:
                score = score + float(slopes[head]) * (keys - i)
            weight = score.exp()
            rest = math.exp(float(sinks[head])) if sinks is not None else 0.0
            out[head, row] = (weight @ v[head, keys]) / (weight.sum() + rest)
    return out


@pytest.mark.parametrize("s", attention.ATTENTION.samples(), ids=lambda s: s.label)
def test_attention_is_dense_attention_per_sequence(s: Sample) -> None:
    out, _ = run(attention.ATTENTION, s)
    layers = [layer.double() for layer in s.args["kv"].keys_and_values(s.attrs)]
    heads, kv_heads, dim = s.attrs["heads"], s.attrs["kv_heads"], s.attrs["head_dim"]
    for i in range(int(s.args["live"][1])):
        first, last = s.args["seq_start"][i : i + 2].tolist()
        length = int(s.args["seq_len"][i])
        where = [(int(s.args["pages"][i, p // 16]), p % 16) for p in range(length)]
        k, v = (torch.stack([layer[page, :, o] for page, o in where], 1) for layer in layers)
        q = s.args["q"][first:last].double().view(-1, heads, dim).transpose(0, 1)
        mask = torch.zeros(last - first, length, dtype=torch.bool)
        for row in range(last - first):
            position = length - (last - first) + row
            low = max(0, position + 1 - s.attrs["window"]) if s.attrs["window"] else 0
            mask[row, low : position + 1 if s.attrs["causal"] else length] = True
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        want = by_definition(s, q, k, v, mask)
        torch.testing.assert_close(
            out["out"][first:last].double(), want.transpose(0, 1).flatten(1), atol=2e-5, rtol=1e-4
        )


def test_rope_kv_stores_normed_turned_keys_and_plain_values() -> None:
    s = pick(rope.ROPE_KV, "norms")
    _, args = run(rope.ROPE_KV, s)
    heads, kv_heads, dim = 2, 2, 48
    keys, values = args["kv"].keys_and_values(s.attrs)
    for t in range(int(s.args["live"][0])):
        row = s.args["qkv"][t].double().numpy().reshape(heads + 2 * kv_heads, dim)
        k = row[heads : heads + kv_heads]
        k = k / np.sqrt((k * k).mean(1, keepdims=True) + 1e-6) * s.args["k_norm"].double().numpy()
        cos, sin = s.args["table"][t].double().numpy().reshape(2, -1)
        half = dim // 2
        k = np.concatenate(
            (k[:, :half] * cos - k[:, half:] * sin, k[:, half:] * cos + k[:, :half] * sin), axis=1
        )
        page, offset = divmod(int(s.args["kv_slots"][t]), 16)
        np.testing.assert_allclose(keys[page, :, offset].numpy(), k, atol=2e-5)
        np.testing.assert_allclose(
            values[page, :, offset].numpy(), row[heads + kv_heads :], atol=0, rtol=1e-7
        )


def test_kv_state_is_poisoned_until_written() -> None:
    attrs = {
        "kv_heads": 1,
        "head_dim": 16,
        "v_head_dim": 16,
        "page_size": 16,
        "layer_offset": 0,
        "page_bytes": 0,
        "kv_dtype": "float32",
    }
    assert bool(KvState(2).layer(attrs).isnan().all())


def test_edits_by_hand() -> None:
    _, args = run(state.EDIT, pick(state.EDIT, "all kinds"))
    before = pick(state.EDIT, "all kinds").args
    assert int(args["counts"][2, 5]) == state.SEEN | 4
    assert int(args["counts"][2].ne(0).sum()) == 1 and float(args["bias"][2].abs().sum()) == 0.0
    assert float(args["bias"][0, 1]) == -math.inf and float(args["bias"][0, 96]) == 0.0
    assert int(args["counts"][1, 7]) == (int(before["counts"][1, 7]) + 2) | state.SEEN
    assert torch.equal(args["counts"][3], before["counts"][3])


def test_penalties_by_hand() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0])
    counts = torch.tensor([state.SEEN, state.SEEN | 2, 3, 0], dtype=torch.int32)
    bias = torch.tensor([0.0, 0.5, 0.0, -1.0])
    z = sample.penalized(logits, counts, bias, frequency=0.1, presence=1.0, repetition=2.0)
    torch.testing.assert_close(z, torch.tensor([1.0, -4.0 - 0.2 - 1.0 + 0.5, 0.5 - 0.3 - 1.0, 0.0]))


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (0, 1.0, 0.0, [0, 1, 2, 3]),
        (2, 1.0, 0.0, [1, 2]),
        (0, 0.75, 0.0, [0, 1, 2]),  # 0.4 + 0.3 < 0.75: one more is needed
        (3, 0.75, 0.0, [1, 2]),  # (0.4 + 0.3) / 0.9 > 0.75
        (0, 1.0, 0.6, [1, 2]),
        (0, 0.0, 0.0, [1]),
        (0, 1.0, 1.0, [1]),
    ],
)
def test_filters_on_a_known_distribution(
    top_k: int, top_p: float, min_p: float, kept: list[int]
) -> None:
    p = torch.tensor([0.2, 0.4, 0.3, 0.1], dtype=torch.double)
    weights = sample.kept_weights(p.log(), 1.0, top_k, top_p, min_p)
    assert weights.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(weights[kept], p[kept] / 0.4)


def test_ties_go_to_the_lower_id() -> None:
    weights = sample.kept_weights(torch.tensor([0.0, 1.0, 1.0, 1.0]), 1.0, 2, 1.0, 0.0)
    assert weights.nonzero().flatten().tolist() == [1, 2]


def test_random_numbers() -> None:
    assert sample.uniform(0, 0) == pytest.approx(sample.uniform(0, 0))
    draws = np.array([sample.uniform(s, p) for s in range(-20, 20) for p in range(50)])
    assert draws.min() >= 0.0 and draws.max() < 1.0 and len(set(draws)) == len(draws)
    assert abs(draws.mean() - 0.5) < 0.02 and abs(draws.var() - 1 / 12) < 0.01
    neighbours = np.array([(sample.uniform(7, p), sample.uniform(7, p + 1)) for p in range(2000)])
    assert abs(np.corrcoef(neighbours.T)[0, 1]) < 0.06


def test_draws_follow_the_distribution() -> None:
    s = sample.make_sample("frequencies", [{"seed": i} for i in range(3000)], vocab=4, columns=4)
    p = torch.tensor([0.5, 0.1, 0.15, 0.25])
    s.args["logits"][:3000] = p.log()
    out, _ = run(sample.SAMPLE, s)
    found = torch.bincount(out["token"][:3000].long(), minlength=4) / 3000
    torch.testing.assert_close(found, p, atol=0.03, rtol=0)


def test_greedy_logprobs_and_state() -> None:
    s = pick(sample.SAMPLE, "greedy")
    out, args = run(sample.SAMPLE, s)
    logits = s.args["logits"][:4, :517].double()
    assert int(out["token"][0]) == 100
    assert math.isnan(float(out["logprob"][0]))
    logprobs = F.log_softmax(logits, dim=1)
    best = logprobs[1].topk(20)
    assert out["top_ids"][1].tolist() == best.indices.tolist()
    torch.testing.assert_close(out["top_logprobs"][1].double(), best.values)
    assert float(out["logprob"][3]) == pytest.approx(float(logprobs[3, 17]))
    assert int(args["last_token"][6]) == 100, "row 0 writes its slot"
    assert int(args["last_token"][3]) == -7, "a scored row writes nothing"
    assert out["top_ids"][2, 3:].eq(-1).all()
