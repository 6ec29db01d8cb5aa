"""The step a tuning run pretends to compute: io inputs of a full bucket at a given context.

Comes in: a bucket and sizes. Goes out: an array per io input. Decode buckets hold sequences of
`context` tokens that get one more; mixed ones hold prompts of at most `context` tokens from their
first token on. Called by `compiler.measure`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compiler.program import Program, resolve
from runtime.artifact import Bucket

Array = npt.NDArray[np.generic]


Lengths = tuple[list[int], list[int]]  # new tokens and keys of every sequence of a step


def lengths(bucket: Bucket, context: int) -> Lengths:
    """Those of a full bucket."""
    if bucket.kind == "decode":
        return [1] * bucket.seqs, [context] * bucket.seqs
    count = min(-(-bucket.tokens // context), bucket.seqs)
    new = [len(part) for part in np.array_split(np.arange(bucket.tokens), count)]
    new = [min(n, context) for n in new]
    return new, new


def pages_of(held: Lengths, page_size: int) -> int:
    """KV pages the step touches."""
    return sum(-(-keys // page_size) for keys in held[1])


def step_inputs(
    program: Program, bucket: Bucket, held: Lengths, page_size: int, pool: int, seed: int = 0
) -> dict[str, Array]:
    """`pool`: pages there are; where fewer than wanted, sequences share them. Everything samples
    greedily. Inputs a program has no use for are left out."""
    g = np.random.default_rng(seed)
    sizes = {"tokens": bucket.tokens, "seqs": bucket.seqs, "pages": bucket.pages}
    out: dict[str, Array] = {}
    for name, value in program.values.items():
        if value.kind == "input":
            out[name] = np.zeros(resolve(value.dims, sizes), value.dtype)
    new, keys = held
    starts = np.concatenate(([0], np.cumsum(new))).astype(np.int32)
    count, tokens = len(new), int(starts[-1])
    embed = next((c.ins["table"] for c in program.calls if c.op == "embed"), None)
    vocab = program.values[embed].dims[0] if embed else 1
    assert isinstance(vocab, int)
    table = np.zeros((bucket.seqs, bucket.pages), np.int32)
    used = 0
    for s, length in enumerate(keys):
        need = -(-length // page_size)
        table[s, :need] = np.arange(used, used + need) % pool
        used += need
    positions = np.concatenate([np.arange(k - n, k) for n, k in zip(new, keys, strict=True)])
    owner = np.repeat(np.arange(count), new)
    values: dict[str, Array] = {
        "live": np.array([tokens, count, count, 0, 0, 0, 0, 0], np.int32),
        "tokens": g.integers(0, vocab, tokens).astype(np.int32),
        "positions": positions.astype(np.int32),
        "kv_slots": table[owner, positions // page_size] * page_size + positions % page_size,
        "seq_start": starts,
        "seq_len": np.array(keys, np.int32),
        "pages": table,
        "row_token": starts[1:] - 1,
        "row_slot": np.arange(count, dtype=np.int32),
        "row_target": np.full(count, -1, np.int32),
        "row_mask": np.full(count, -1, np.int32),
        "top_p": np.ones(count, np.float32),
        "repetition": np.ones(count, np.float32),
    }
    for name, given in values.items():
        if name in out:
            out[name][: len(given)] = given
    return out
