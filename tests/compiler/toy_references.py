"""How the reference models of toy_models are asked for logits, where a plain forward is not what
their families do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[list[int], int], Tensor]
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@dataclass
class Reference:
    """`forward(tokens, prompt)`: logits [tokens, vocabulary] of a sequence whose first `prompt`
    tokens were its prompt and the rest generated one by one."""

    model: Any
    forward: Forward

    def logits(self, tokens: list[int], prompt: int | None = None) -> Tensor:
        with torch.inference_mode():
            return self.forward(tokens, len(tokens) if prompt is None else prompt).float()

    def logprobs(self, tokens: list[int], prompt: int | None = None) -> Tensor:
        return self.logits(tokens, prompt).log_softmax(-1)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, len(prompt))[-1].argmax()))
        return tokens[len(prompt) :]


def full(model: Any) -> Reference:
    """One forward over the prompt, and one over everything for each generated token: what
    `generate` does where rope switches with the length (it drops the cache and computes again),
    and the same as one forward where it does not."""

    def forward(tokens: list[int], prompt: int) -> Tensor:
        if not hasattr(model.config, "original_max_position_embeddings"):
            return model(torch.tensor([tokens])).logits[0]
        rows = [model(torch.tensor([tokens[:prompt]])).logits[0]]
        for end in range(prompt + 1, len(tokens) + 1):
            rows.append(model(torch.tensor([tokens[:end]])).logits[0, -1:])
        return torch.cat(rows)

    return Reference(model, forward)


def growing(model: Any) -> Reference:
    """Dynamic NTK: the prompt at once, then token by token on the cache of before."""

    def forward(tokens: list[int], prompt: int) -> Tensor:
        model(torch.tensor([tokens[:1]]))  # resets the frequencies of an earlier, longer sequence
        out = model(torch.tensor([tokens[:prompt]]), use_cache=True)
        rows = [out.logits[0]]
        for token in tokens[prompt:]:
            past = out.past_key_values
            out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            rows.append(out.logits[0])
        return torch.cat(rows)

    return Reference(model, forward)


QWEN_LENGTH = 16  # what the toy Qwen calls its training length


def by_prompt(model: Any) -> Reference:
    """The first Qwen: the base of rope grows with the prompt's length, queries with their
    position."""
    from transformers import AttentionInterface
    from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

    def attention(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        n = torch.arange(1, query.shape[2] + 1)
        scale = (n.log() / math.log(QWEN_LENGTH)).clamp(min=1)
        return eager_attention_forward(module, query * scale[:, None], *args, **kwargs)

    AttentionInterface.register("logn", attention)
    model.config._attn_implementation = "logn"
    dim = model.model.rotary_emb.inv_freq.numel() * 2

    def forward(tokens: list[int], prompt: int) -> Tensor:
        alpha = max(2 ** math.ceil(math.log2(prompt / QWEN_LENGTH) + 1) - 1, 1)
        base = 10000.0 * alpha ** (dim / (dim - 2))
        model.model.rotary_emb.inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        count = len(tokens)
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
        masks = {"full_attention": mask}
        return model(torch.tensor([tokens]), attention_mask=masks).logits[0]

    return Reference(model, forward)


def alibi(model: Any) -> Reference:
    """No rotation; slopes of distance in a float mask. Six heads: four, then every second of
    eight."""
    model.model.rotary_emb.inv_freq.zero_()
    slopes = torch.tensor([2.0**-e for e in (2, 4, 6, 8, 1, 3)])

    def forward(tokens: list[int], prompt: int) -> Tensor:
        at = torch.arange(len(tokens))
        mask = slopes[:, None, None] * (at[None, :] - at[:, None])
        mask = mask.masked_fill(at[None, :] > at[:, None], float("-inf"))[None]
        return model(torch.tensor([tokens]), attention_mask=mask).logits[0]

    return Reference(model, forward)
