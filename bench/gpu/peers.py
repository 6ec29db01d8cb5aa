"""The peers on a GPU: a hand-written Llama under torch.compile with a static cache, as gpt-fast
does it, and transformers with its own static cache.

Comes in: a model shape with random weights. Out: milliseconds per decode step by batch. `device`
and `dtype` exist so that the peers can be proven without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.peers.shape import Shape
from conf.bench_schema import GpuConfig

Tensor = torch.Tensor
Peer = Callable[[Shape, int, int, str, torch.dtype], list[float]]
STEPS, WARM = 32, 4  # decode steps that count, and those before them


class Layer(nn.Module):
    """One fused product each for q, k, v and for gate and up; the cache is written in place at a
    position that is data, so that one graph serves every step."""

    keys: Tensor
    values: Tensor

    def __init__(self, shape: Shape, batch: int, context: int) -> None:
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        self.norm = nn.RMSNorm(shape.dim, shape.eps)
        self.qkv = nn.Linear(shape.dim, width + 2 * shape.kv_width, bias=False)
        self.o = nn.Linear(width, shape.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.dim, shape.eps)
        self.gate_up = nn.Linear(shape.dim, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.dim, bias=False)
        size = (batch, shape.kv_heads, context, shape.head_dim)
        self.register_buffer("keys", torch.zeros(size))
        self.register_buffer("values", torch.zeros(size))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        s = self.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, -1, s.head_dim).transpose(1, 2)
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), dim=1)
        self.keys.index_copy_(2, at, _rotate(k, cos, sin))
        self.values.index_copy_(2, at, v)
        y = F.scaled_dot_product_attention(
            _rotate(q, cos, sin), self.keys, self.values, attn_mask=mask, enable_gqa=True
        )
        x = x + self.o(y.transpose(1, 2).reshape(batch, tokens, -1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class StaticLlama(nn.Module):
    cos: Tensor
    sin: Tensor
    causal: Tensor

    def __init__(self, shape: Shape, batch: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.dim)
        self.layers = nn.ModuleList(Layer(shape, batch, context) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, shape.eps)
        self.head = nn.Linear(shape.dim, shape.vocab, bias=False)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        angle = torch.outer(torch.arange(context, dtype=torch.float32), shape.rope_theta**-half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.register_buffer("causal", torch.tril(torch.ones(context, context, dtype=torch.bool)))

    def forward(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Logits of the last of `tokens` [batch, n], which stand at positions `at` [n]."""
        x = self.embed(tokens)
        cos, sin = self.cos[at].to(x.dtype), self.sin[at].to(x.dtype)
        mask = self.causal[at]
        for layer in self.layers:
            x = layer(x, cos, sin, mask, at)
        return self.head(self.norm(x[:, -1:]))

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Takes the arrays of `Shape.random_weights`; q, k and v are merged, and gate and up."""
        found = {name: torch.from_numpy(array) for name, array in weights}
        self.embed.weight.copy_(found["model.embed_tokens.weight"])
        head = found.get("lm_head.weight", found["model.embed_tokens.weight"])
        self.head.weight.copy_(head)
        self.norm.weight.copy_(found["model.norm.weight"])
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)

            def of(*names: str, prefix: str = f"model.layers.{number}.") -> Tensor:
                return torch.cat([found[f"{prefix}{name}.weight"] for name in names])

            layer.norm.weight.copy_(of("input_layernorm"))
            projections = (f"self_attn.{p}_proj" for p in "qkv")
            layer.qkv.weight.copy_(of(*projections))
            layer.o.weight.copy_(of("self_attn.o_proj"))
            layer.ffn_norm.weight.copy_(of("post_attention_layernorm"))
            layer.gate_up.weight.copy_(of("mlp.gate_proj", "mlp.up_proj"))
            layer.down.weight.copy_(of("mlp.down_proj"))


def build(
    shape: Shape, batch: int, context: int, *, device: str, dtype: torch.dtype
) -> StaticLlama:
    """Made where it will run: on a CPU eight billion numbers take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return StaticLlama(shape, batch, context).eval()
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def greedy(
    model: StaticLlama, prompt: Tensor, steps: int, *, compile: bool
) -> tuple[Tensor, list[float]]:
    """Tokens [batch, steps] that follow the prompt [batch, n], and the seconds of each step but the
    first, which is the prefill's."""
    device = prompt.device

    def next_token(token: Tensor, at: Tensor) -> Tensor:
        return model(token, at)[:, 0].argmax(-1, keepdim=True)

    token = next_token(prompt, torch.arange(prompt.shape[1], device=device))
    step = (
        torch.compile(next_token, mode="reduce-overhead", fullgraph=True) if compile else next_token
    )
    tokens, seconds = [token], []
    for i in range(steps - 1):
        at = torch.tensor([prompt.shape[1] + i], device=device)
        _settle(device.type)
        began = time.perf_counter()
        token = step(token, at).clone()
        _settle(device.type)
        seconds.append(time.perf_counter() - began)
        tokens.append(token)
    return torch.cat(tokens, 1), seconds


def static_llama(
    shape: Shape, batch: int, context: int, device: str, dtype: torch.dtype
) -> list[float]:
    """Seconds of each of STEPS decode steps after `context` tokens."""
    torch.manual_seed(0)
    # The causal mask and the cache are sized for the run, as a user would.
    model = build(shape, batch, context + STEPS + WARM, device=device, dtype=dtype)
    prompt = torch.zeros(batch, context, dtype=torch.long, device=device)
    return greedy(model, prompt, STEPS + WARM, compile=True)[1][WARM - 1 :]


@torch.inference_mode()
def transformers_static(
    shape: Shape, batch: int, context: int, device: str, dtype: torch.dtype
) -> list[float]:
    """Seconds per token of `generate` with transformers' static cache, which compiles the step:
    the difference of two lengths over their difference."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in shape.config.items() if k != "model_type"}
    config = AutoConfig.for_model(str(shape.config["model_type"]), **settings)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    prompt = torch.ones(batch, context, dtype=torch.long, device=device)

    def generate(count: int) -> float:
        _settle(device)
        began = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        _settle(device)
        return time.perf_counter() - began

    short, long = 4, 4 + STEPS
    generate(short), generate(long)
    return [(generate(long) - generate(short)) / STEPS for _ in range(3)]


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# Batch and peer, in the order of the goals they are for.
PEERS: tuple[tuple[int, str, Peer], ...] = (
    (1, "compiled", static_llama),
    (8, "compiled", static_llama),
    (1, "transformers", transformers_static),
)


def peers(config: GpuConfig, model: str) -> Iterator[dict[str, Any]]:
    """The figures so far, after each peer at each batch."""
    device = config.torch_device
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    shape = Shape.load(model.partition("/")[0])
    out: dict[str, Any] = {"torch": torch.__version__, "device": device}
    for batch, name, peer in PEERS:
        if batch not in config.batch:
            continue
        try:
            times = peer(shape, batch, config.context, device, torch.bfloat16)
            out[f"{name}_batch_{batch}_ms"] = 1e3 * median(times)
        except Exception as error:  # noqa: BLE001 - a peer that fails stops no other
            out[f"{name}_batch_{batch}_error"] = f"{type(error).__name__}: {error}"[:300]
        yield out
        if device == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()
