"""Torch eager: the plainest Llama one would write by hand, with a static KV cache and
`scaled_dot_product_attention`.

`precision` int8 and int4 apply torchao's weight-only quantization to every linear (head included),
as our artifacts do.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.peers.shape import Shape
from bench.peers.torch_precision import DTYPES, quantize

Tensor = torch.Tensor


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.heads * shape.head_dim
        self.norm = nn.RMSNorm(shape.dim, shape.eps)
        self.qkv = nn.Linear(shape.dim, width + 2 * shape.kv_width, bias=False)
        self.o = nn.Linear(width, shape.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.dim, shape.eps)
        self.gate_up = nn.Linear(shape.dim, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.dim, bias=False)
        self.shape = shape

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, start: int) -> Tensor:
        batch, tokens, _ = x.shape
        s = self.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, -1, s.head_dim).transpose(1, 2)
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), dim=1)
        end = start + tokens
        kv[0, :batch, :, start:end] = _rotate(k, cos, sin)
        kv[1, :batch, :, start:end] = v
        attended = F.scaled_dot_product_attention(
            _rotate(q, cos, sin),
            kv[0, :batch, :, :end],
            kv[1, :batch, :, :end],
            is_causal=tokens > 1,
            enable_gqa=True,
        )
        x = x + self.o(attended.transpose(1, 2).reshape(batch, tokens, -1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Llama(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.dim)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, shape.eps)
        self.head = nn.Linear(shape.dim, shape.vocab, bias=False)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        self.inverse = shape.rope_theta**-half

    def forward(self, tokens: Tensor, kv: Tensor, start: int) -> Tensor:
        """Logits of the last token; `kv` [layers, 2, batch, kv_heads, context, head_dim] holds
        `start` tokens before."""
        x = self.embed(tokens)
        positions = torch.arange(start, start + tokens.shape[1], dtype=torch.float32)
        angle = torch.outer(positions, self.inverse)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer, cache in zip(self.layers, kv, strict=True):
            x = layer(x, cos, sin, cache, start)
        return self.head(self.norm(x[:, -1:]))


class TorchEager:
    def __init__(
        self, shape: Shape, precision: str, threads: int, max_batch: int, context: int
    ) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        dtype = DTYPES[precision]
        self.vocab = shape.vocab
        self.model = Llama(shape).to(dtype).eval()
        quantize(self.model, precision)
        size = (shape.layers, 2, max_batch, shape.kv_heads, context, shape.head_dim)
        self.kv = torch.zeros(size, dtype=dtype)
        self.filled: tuple[int, int] = (0, 0)

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def kv_token_bytes(self) -> float:
        layers, two, _, heads, _, width = self.kv.shape
        return layers * two * heads * width * self.kv.element_size()

    def _tokens(self, batch: int, tokens: int) -> Tensor:
        return torch.randint(self.vocab, (batch, tokens))

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        prompt = self._tokens(1, tokens)
        start = time.perf_counter()
        self.model(prompt, self.kv, 0)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        if self.filled[0] < batch or self.filled[1] < context:
            self.model(self._tokens(batch, context), self.kv, 0)
            self.filled = (batch, context)
        seconds = []
        token = self._tokens(batch, 1)
        for step in range(steps):
            start = time.perf_counter()
            token = self.model(token, self.kv, context + step)[:, 0].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        pass


def open_runner(
    *, name: str, config: dict[str, Any], precision: str, threads: int, max_batch: int, context: int
) -> TorchEager:
    return TorchEager(Shape.of(name, config), precision, threads, max_batch, context)
