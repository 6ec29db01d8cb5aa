"""Transformers' own `generate`, greedy, with its default cache.

Step times come from a stopping criterion, which `generate` calls once per new token; the time to
the first call is the prefill. Weights are random; `precision` int8 and int4 apply torchao's
weight-only quantization.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
import transformers

from bench.peers.shape import Shape
from bench.peers.torch_precision import DTYPES, quantize


class Clock(transformers.StoppingCriteria):
    """Stamps every new token and never stops."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class TransformersGenerate:
    def __init__(self, shape: Shape, precision: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**shape.config)
        self.shape, self.precision = shape, precision
        model: Any = transformers.LlamaForCausalLM(config)
        self.model = model.to(DTYPES[precision]).eval()
        if precision in ("int8", "int4"):
            # A tied head would quantize the embedding with it; torchao leaves embeddings alone.
            self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.clone())
            quantize(self.model, precision)

    def version(self) -> str:
        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def kv_token_bytes(self) -> float:
        size = DTYPES[self.precision].itemsize
        return 2 * self.shape.layers * self.shape.kv_width * size

    def _generate(self, batch: int, context: int, steps: int) -> tuple[float, list[float]]:
        prompt = torch.randint(1, self.shape.vocab, (batch, context))
        clock = Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        stamps = clock.stamps
        return stamps[0] - start, [b - a for a, b in itertools.pairwise(stamps)]

    def prefill(self, tokens: int) -> float:
        return self._generate(1, tokens, 1)[0]

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        return self._generate(batch, context, steps + 1)[1]

    def close(self) -> None:
        pass


def open_runner(
    *, name: str, config: dict[str, Any], precision: str, threads: int, max_batch: int, context: int
) -> TransformersGenerate:
    return TransformersGenerate(Shape.of(name, config), precision, threads)
