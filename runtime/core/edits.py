"""Token-state edits of a sequence: what the device must know before it samples with penalties, bias
or bans.

Comes in: a sequence and its slot. Goes out: [e, 4] int32 arrays of (slot, token, kind, value),
applied in order; kinds as in `StepInput.edits`. Called by the scheduler on a sequence's last prompt
chunk and when min_new_tokens is reached.
"""

from __future__ import annotations

import numpy as np

from runtime.core.sequence import Sequence
from runtime.device.base import I32
from runtime.request import Request

CLEAR, MARK, COUNT, BIAS = range(4)


def first_edits(seq: Sequence, slot: int, tokens: I32, banned: bool) -> I32:
    """Everything from a slot in unknown state to this sequence's: `tokens` are its prompt and the
    outputs so far.
    """
    sampling = seq.request.sampling
    parts = [_edits(slot, np.zeros(1, np.int32), CLEAR, 0)]
    if sampling.repetition_penalty != 1.0:
        parts.append(_edits(slot, np.unique(tokens[: seq.prompt_size]), MARK, 0))
    outputs, counts = np.unique(tokens[seq.prompt_size :], return_counts=True)
    if len(outputs):
        parts.append(_edits(slot, outputs, COUNT, counts))
    if sampling.logit_bias:
        ids = np.fromiter(sampling.logit_bias, np.int32)
        values = np.fromiter(sampling.logit_bias.values(), np.float32)
        parts.append(_edits(slot, ids, BIAS, values.view(np.int32)))
    if banned:
        parts.append(_bias(slot, seq.ban, [-np.inf] * len(seq.ban)))
    return np.concatenate(parts)


def lift_ban(seq: Sequence, slot: int) -> I32:
    """The stop tokens may come from now on: their bias is what the request asked for."""
    bias = seq.request.sampling.logit_bias
    return _bias(slot, seq.ban, [bias.get(token, 0.0) for token in seq.ban])


def most_edits(request: Request, stops: int) -> int:
    """An upper bound of `first_edits`, whenever it is asked."""
    sampling = request.sampling
    return 1 + len(request.tokens) + sampling.max_new_tokens + len(sampling.logit_bias) + stops


def _bias(slot: int, tokens: tuple[int, ...], values: list[float]) -> I32:
    return _edits(
        slot, np.array(tokens, np.int32), BIAS, np.array(values, np.float32).view(np.int32)
    )


def _edits(slot: int, tokens: I32, kind: int, value: int | np.ndarray) -> I32:
    out = np.empty((len(tokens), 4), np.int32)
    out[:, 0], out[:, 1], out[:, 2], out[:, 3] = slot, tokens, kind, value
    return out
