"""Rope whose frequencies depend on a request's length: the rows of frequencies a program holds, and
the rule by which the runtime picks a token's row.

Keys computed with different rows cannot be mixed or shared, so the row is data of the step (io
`rope_variant`) and part of the prefix cache's page keys. Called by `compiler.model` and the
manifest.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from compiler.errors import CompileError
from compiler.families.spec import ByLength, DynamicNtk, LongRope, ModelSpec, QwenNtk, RopeSpec
from runtime.artifact import LengthRule


def variants(rope: RopeSpec, context: int) -> int:
    """How many choices of frequencies a sequence of up to `context` tokens can meet."""
    match rope.by_length:
        case LongRope(original=original):
            return 2 if context > original else 1
        case DynamicNtk(original=original):
            return max(context - original, 0) + 1
        case QwenNtk() as rule:
            return len(_qwen_alphas(rule, context))
    return 1


def frequencies(rope: RopeSpec, context: int) -> npt.NDArray[np.float32]:
    """[variants, rotary_dim / 2]: row 0 is `inv_freq`."""
    rows = [np.asarray(rope.inv_freq, np.float32)]
    match rope.by_length:
        case LongRope(original=original, long_freq=long) if context > original:
            rows.append(np.asarray(long, np.float32))
        case DynamicNtk() as rule:
            for n in range(rule.original + 1, context + 1):
                base = rule.theta * ntk(rule.factor * n / rule.original - rule.factor + 1, rope)
                rows.append(_powers(base, rope.rotary_dim))
        case QwenNtk() as rule:
            for alpha in _qwen_alphas(rule, context)[1:]:
                rows.append(_powers(rule.theta * ntk(alpha, rope), rope.rotary_dim))
    return np.stack(rows)


def ntk(alpha: float, rope: RopeSpec) -> float:
    """By what an NTK-aware scaling of `alpha` multiplies the base."""
    return float(alpha ** (rope.rotary_dim / (rope.rotary_dim - 2)))


def length_rule(spec: ModelSpec, context: int) -> LengthRule | None:
    """None where every token of every sequence has the same frequencies."""
    ropes = {layer.mixer.rope for layer in spec.layers if layer.mixer.rope is not None}
    rules: set[ByLength] = {
        rope.by_length
        for rope in ropes
        if rope.by_length is not None and variants(rope, context) > 1
    }
    if len(rules) > 1:
        raise CompileError(
            f"family {spec.family}: {len(rules)} different rules for rope by length in one model; "
            "a step has room for one"
        )
    match next(iter(rules), None):
        case LongRope(original=original):
            return LengthRule(of="sequence", bounds=(original,))
        case DynamicNtk(original=original):
            return LengthRule(of="token", bounds=(original,))
        case QwenNtk() as rule:
            count = len(_qwen_alphas(rule, context))
            return LengthRule(
                of="prompt", bounds=tuple(rule.original << i for i in range(count - 1))
            )
    return None


def _qwen_alphas(rule: QwenNtk, context: int) -> list[float]:
    """The distinct alpha of prompts up to `context`: 1, 3 beyond `original`, 7 beyond twice that,
    and so on."""
    steps = max(0, math.ceil(math.log2(context / rule.original)))
    return [1.0, *(2.0 ** (i + 1) - 1 for i in range(1, steps + 1))]


def _powers(theta: float, dim: int) -> npt.NDArray[np.float32]:
    """theta^(-2i/dim), rounded as torch does: the power in float32."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (np.float32(1) / np.float32(theta) ** exponents).astype(np.float32)
