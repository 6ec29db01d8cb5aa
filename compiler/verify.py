"""Verification at compile time: how far quantization moves the logits, and which tokens the
finished artifact gives on this machine.

Comes in: a design with its weights, or an artifact on a device. Goes out: the accuracy record (a
gate when `accuracy.max_delta` is set) and golden greedy tokens. Called by the pipeline and by
`inspect verify`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from compiler.design import Design
from compiler.errors import CompileError
from compiler.interpret import Chunk, greedy_step, new_state, run
from compiler.model import constants
from compiler.store import exact, rounded
from compiler.weights import Weights
from conf.schema import CompileConfig

PROMPT_TOKENS = 32
WeightOf = Callable[[str], torch.Tensor]


def prompt(vocab: int, context: int, seed: int = 0) -> list[int]:
    """Seeded tokens: the same for every compile of a shape."""
    count = min(PROMPT_TOKENS, context - 1)
    return [int(t) for t in np.random.default_rng(seed).integers(0, vocab, count)]


def measure_accuracy(made: Design, source: Weights) -> dict[str, float]:
    """Logits of every prompt position with the stored numbers against the original ones, both in
    the reference interpreter: relative error, largest difference, share of equal best tokens."""
    if all(format == "float32" for format in made.formats.values()):
        return {"logit_error": 0.0, "logit_max": 0.0, "top1": 1.0}
    weights = {weight.name: weight for weight in made.weights}
    fixed = constants(made.spec)
    a = _logits(made, lambda name: exact(weights[name], source, fixed))
    b = _logits(made, lambda name: rounded(weights[name], source, fixed))
    return {
        "logit_error": round(float((a - b).norm() / a.norm()), 6),
        "logit_max": round(float((a - b).abs().max()), 6),
        "top1": round(float((a.argmax(1) == b.argmax(1)).double().mean()), 6),
    }


def check_accuracy(accuracy: dict[str, float], config: CompileConfig) -> None:
    limit = config.accuracy.max_delta
    if limit is not None and accuracy["logit_error"] > limit:
        raise CompileError(
            f"quant={config.quant.scheme} dtype={config.dtype}: relative logit error "
            f"{accuracy['logit_error']:.4g} exceeds accuracy.max_delta={limit:g}; choose smaller "
            "groups, another scheme or a larger limit"
        )


def _logits(made: Design, weight: WeightOf) -> torch.Tensor:
    size = made.shape.page_size
    tokens = prompt(made.spec.vocab, made.spec.context)
    pages = list(range(-(-len(tokens) // size)))
    inputs = greedy_step(
        [Chunk(tokens=tokens, pages=pages)], size, made.shape.edits, every_row=True
    )
    state = new_state(made.program, len(pages))
    with torch.inference_mode():
        return run(made.program, inputs, state, weight, keep=("logits",))["logits"].double()
