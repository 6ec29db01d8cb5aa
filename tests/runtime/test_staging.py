"""Which bucket serves a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_null import good

from runtime.artifact import Bucket
from runtime.device.base import StepInput
from runtime.device.staging import by_cost, demand, none_fits

BUCKETS = by_cost(
    (
        Bucket(name="m8", tokens=8, seqs=4, pages=4),
        Bucket(name="m4", tokens=4, seqs=4, pages=4),
        Bucket(name="d4", tokens=4, seqs=4, pages=4, kind="decode"),
        Bucket(name="d1", tokens=1, seqs=1, pages=4, kind="decode"),
    )
)


def chosen(step: StepInput) -> str:
    fitting = [b.name for b in BUCKETS if demand(step).fits(b)]
    if not fitting:
        raise none_fits(demand(step), BUCKETS)
    return fitting[0]


def decoding(seqs: int) -> StepInput:
    """A step of one token per sequence; only the sizes count."""
    step = good()
    return replace(
        step,
        tokens=np.zeros(seqs, np.int32),
        seq_len=np.ones(seqs, np.int32),
        row_token=np.zeros(seqs, np.int32),
        pages=np.zeros((seqs, 1), np.int32),
    )


def test_decode_buckets_serve_steps_of_one_token_per_sequence_only() -> None:
    assert chosen(decoding(1)) == "d1"
    assert chosen(decoding(3)) == "d4"
    chunk = replace(decoding(1), tokens=np.zeros(3, np.int32))
    assert chosen(chunk) == "m4"
    rows = replace(decoding(1), row_token=np.zeros(3, np.int32))  # a prompt being scored
    assert chosen(rows) == "d4"
    with pytest.raises(ValueError, match="no plan for 9 tokens"):
        chosen(replace(decoding(1), tokens=np.zeros(9, np.int32)))
