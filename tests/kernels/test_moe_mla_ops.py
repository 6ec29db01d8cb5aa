"""References of routing, experts and latent attention against formulas written another way: one
token at a time, plain (not absorbed) attention, in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import kernels.ops.register  # noqa: F401
from kernels.op import OPS, Sample
from kernels.ops import mla, moe, route
from kernels.ops.embed import live_rows


def run(name: str, s: Sample) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    args = copy.deepcopy(s.args)
    return OPS[name].reference(args, s.attrs), args


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("s", route.ROUTE.samples(), ids=lambda s: s.label)
def test_route_token_by_token(s: Sample) -> None:
    out, _ = run("route", s)
    a = s.attrs
    for t in range(live_rows(s.args, s.attrs)):
        logits = s.args["logits"][t].double().numpy()
        scores = {"softmax": softmax(logits), "sigmoid": 1 / (1 + np.exp(-logits))}.get(
            a["score"], logits
        )
        choice = scores + (s.args["bias"].double().numpy() if "bias" in s.args else 0.0)
        size = len(choice) // a["groups"]
        if a["groups"] > 1:
            worth = [
                sum(sorted(choice[g * size : (g + 1) * size])[-a["group_best"] :])
                for g in range(a["groups"])
            ]
            kept = sorted(range(a["groups"]), key=lambda g: (-worth[g], g))[: a["kept_groups"]]
        else:
            kept = [0]
        allowed = [e for e in range(len(choice)) if e // size in kept]
        ids = sorted(allowed, key=lambda e: (-choice[e], e))[: a["k"]]
        weights = scores[ids]
        if a["score"] == "chosen":
            weights = softmax(weights)
        if a["renormalise"]:
            weights = weights / weights.sum()
        assert out["ids"][t].tolist() == ids
        np.testing.assert_allclose(out["weights"][t].numpy(), weights * a["scale"], rtol=1e-5)


@pytest.mark.parametrize("s", route.EXPERT_ORDER.samples(), ids=lambda s: s.label)
def test_order_sorts_pairs_by_expert(s: Sample) -> None:
    out, _ = run("expert_order", s)
    n, experts = live_rows(s.args, s.attrs), s.attrs["experts"]
    flat, order, starts = (
        s.args["ids"][:n].flatten().tolist(),
        out["order"].flatten(),
        out["starts"],
    )
    assert starts[0] == 0 and starts[-1] == len(flat)
    for e in range(experts):
        pairs = order[starts[e] : starts[e + 1]].tolist()
        assert pairs == [p for p, expert in enumerate(flat) if expert == e]


def pair_experts(s: Sample) -> dict[int, int]:
    order, starts = s.args["order"].flatten().tolist(), s.args["starts"].tolist()
    return {order[i]: e for e in range(len(starts) - 1) for i in range(starts[e], starts[e + 1])}


@pytest.mark.parametrize("s", moe.MOE_GATE_UP.samples(), ids=lambda s: s.label)
def test_gate_up_pair_by_pair(s: Sample) -> None:
    out, _ = run("moe_gate_up", s)
    k = s.args["order"].shape[1]
    for pair, e in pair_experts(s).items():
        x, w = s.args["x"][pair // k].double().numpy(), s.args["w"][e].double().numpy()
        y = w @ x
        if "bias" in s.args:
            y = y + s.args["bias"].view(len(s.args["w"]), -1)[e].double().numpy()
        gate, up = np.split(y, 2)
        if s.attrs["act"] == "swiglu":
            want = gate / (1 + np.exp(-gate)) * up
        elif s.attrs["act"] == "geglu_tanh":
            inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
            want = gate / 2 * (1 + np.tanh(inner)) * up
        else:
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            want = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
        np.testing.assert_allclose(out["out"].flatten(0, 1)[pair].numpy(), want, atol=2e-5)


@pytest.mark.parametrize("s", moe.MOE_DOWN.samples(), ids=lambda s: s.label)
def test_down_pair_by_pair(s: Sample) -> None:
    out, _ = run("moe_down", s)
    for pair, e in pair_experts(s).items():
        x = s.args["x"].flatten(0, 1)[pair].double().numpy()
        want = s.args["w"][e].double().numpy() @ x
        if "bias" in s.args:
            want = want + s.args["bias"].view(len(s.args["w"]), -1)[e].double().numpy()
        np.testing.assert_allclose(out["out"].flatten(0, 1)[pair].numpy(), want, atol=2e-5)


@pytest.mark.parametrize("s", moe.MOE_COMBINE.samples(), ids=lambda s: s.label)
def test_combine(s: Sample) -> None:
    out, _ = run("moe_combine", s)
    n = live_rows(s.args, s.attrs)
    a = {name: v[:n].double().numpy() for name, v in s.args.items() if name != "live"}
    want = np.einsum("tkd,tk->td", a["y"], a["weights"])
    if "shared" in a:
        want += a["shared"] / (1 + np.exp(-a["gate"])) if "gate" in a else a["shared"]
    want += a.get("residual", 0.0)
    np.testing.assert_allclose(out["out"][:n].numpy(), want, atol=1e-5)


def turn(x: np.ndarray, angle: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rotation of pairs as multiplication by exp(i angle)."""
    half = x.shape[-1] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    z = (a + 1j * b) * np.exp(1j * angle)
    out = np.empty_like(x)
    if interleaved:
        out[..., ::2], out[..., 1::2] = z.real, z.imag
    else:
        out[..., :half], out[..., half:] = z.real, z.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
def test_absorbed_attention_is_plain_attention(interleaved: bool) -> None:
    """Three ops in a row against keys and values expanded per head, rows of one sequence."""
    rng = np.random.default_rng(0)
    tokens, heads, latent, rotary, nope, value, scale = 21, 3, 48, 8, 32, 24, 0.2
    q = rng.standard_normal((tokens, heads, nope + rotary))
    compressed = rng.standard_normal((tokens, latent + rotary))
    norm, up = rng.standard_normal(latent), rng.standard_normal((heads, nope + value, latent)) * 0.2
    angle = np.arange(tokens)[:, None] * 100.0 ** (-np.arange(0, rotary, 2) / rotary)

    c = compressed[:, :latent]
    c = c / np.sqrt((c * c).mean(1, keepdims=True) + 1e-6) * norm
    key_rope = turn(compressed[:, latent:], angle, interleaved)
    want = np.zeros((tokens, heads, value))
    for h in range(heads):
        k = np.concatenate((c @ up[h, :nope].T, key_rope), axis=1)
        query = np.concatenate((q[:, h, :nope], turn(q[:, h, nope:], angle, interleaved)), axis=1)
        scores = np.where(np.tri(tokens, dtype=bool), query @ k.T * scale, -np.inf)
        want[:, h] = softmax(scores) @ (c @ up[h, nope:].T)

    def f(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).float()

    live = torch.tensor([tokens, 1, 0, 0, 0, 0, 0, 0], dtype=torch.int32)
    table = torch.cat((f(np.cos(angle)), f(np.sin(angle))), dim=1)
    common = {"live": live, "table": table}
    page = mla._attrs(latent, rotary, "float32")
    kv = mla.KvState(4)
    pages = torch.tensor([[3, 1]], dtype=torch.int32)
    slots = torch.tensor([[3, 1][p // 16] * 16 + p % 16 for p in range(tokens)], dtype=torch.int32)
    turned = {"interleaved": interleaved}
    mla.mla_kv_write_reference(
        {**common, "x": f(compressed), "norm": f(norm), "kv_slots": slots, "kv": kv},
        {**page, **turned, "eps": 1e-6},
    )
    absorbed = mla.head_linear_reference(
        {**common, "x": f(q).flatten(1), "w": f(up[:, :nope]).transpose(1, 2)},
        {"heads": heads, **turned},
    )["out"]
    sequence = {"seq_start": torch.tensor([0, tokens]), "seq_len": torch.tensor([tokens])}
    latents = mla.mla_attention_reference(
        {"live": live, "q": absorbed, "kv": kv, "pages": pages, **sequence},
        {**page, "heads": heads, "scale": scale},
    )["out"]
    got = mla.head_linear_reference(
        {"live": live, "x": latents, "w": f(up[:, nope:])}, {"heads": heads, **turned}
    )["out"]
    np.testing.assert_allclose(got.numpy(), want.reshape(tokens, -1), atol=2e-5)
