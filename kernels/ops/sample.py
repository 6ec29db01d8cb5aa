"""Sampling, the last call of a step.

Order of sampling: repetition, frequency and presence penalties, bias, the grammar's mask (what it
leaves out is -inf), temperature, top-k, top-p (over what top-k kept, renormalised), min-p; then
inverse CDF in order of token ids. `uniform` below is the whole random number generator.
Log-probabilities are those of the logits as they came. S logit rows, V vocabulary.

`masks` is a table of bits, [rows, ceil(V / 32)] int32: bit b of word w allows token 32 w + b.
`row_mask` is a row's place in it, -1 where every token is allowed. Only the rows it names are read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.embed import LIVE, live_count
from kernels.ops.samples import POISON, floats, generator, live, padded
from kernels.ops.state import BIASES, COUNTS, SEEN

TOP = 20
PENALTIES, LOGPROB = 1, 2  # row_flags
NOT_FINITE, NOTHING_ALLOWED = 1, 2  # status; such a row has no token and leaves the state as it is
GREEDY_BELOW = 1e-5  # temperatures that would overflow are greedy
_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """In [0, 1), a function of (seed, position of the row's token) alone: SplitMix64's output
    function on the seed, the position added in steps of the golden ratio, mixed again; the top
    53 bits."""
    x = (_mix((seed + 0x9E3779B97F4A7C15) & _MASK) + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    return (_mix(x) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def penalized(
    logits: Tensor,
    counts: Tensor,
    bias: Tensor,
    frequency: float,
    presence: float,
    repetition: float,
) -> Tensor:
    output = counts & (SEEN - 1)
    seen = counts != 0
    z = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return z - frequency * output - presence * (output > 0) + bias


def kept_weights(z: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Unnormalised probabilities in float64, zero where a filter removed the token. Ties go to
    the lower id."""
    weights = ((z.double() - z.max().double()) / temperature).exp()
    order = torch.sort(z, descending=True, stable=True).indices
    ranked = weights[order]
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if 0 < top_k < len(z):
        keep[top_k:] = False
    if top_p < 1.0:
        mass = (ranked * keep).cumsum(0)
        before = torch.cat((torch.zeros(1, dtype=torch.double), mass[:-1]))
        keep &= before < top_p * mass[-1]
    keep &= ranked >= min_p
    keep[0] = True
    return torch.zeros_like(weights).index_copy_(0, order, ranked * keep)


def sample_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    rows = len(args["row_token"])
    out = {
        "token": torch.zeros(rows, dtype=torch.int32),
        "logprob": torch.full((rows,), math.nan),
        "top_ids": torch.full((rows, TOP), -1, dtype=torch.int32),
        "top_logprobs": torch.full((rows, TOP), math.nan),
        "status": torch.zeros(rows, dtype=torch.int32),
    }
    for r in range(live_count(args, 2)):
        _sample_row(r, args, args["logits"][r, : attrs["vocab"]], out)
    return out


def _sample_row(r: int, args: dict[str, Any], logits: Tensor, out: dict[str, Tensor]) -> None:
    if not bool(torch.isfinite(logits).all()):
        out["status"][r] = NOT_FINITE
        return
    slot, target, flags = (int(args[n][r]) for n in ("row_slot", "row_target", "row_flags"))
    token = target if target >= 0 else _choose(r, args, logits, slot, flags)
    if token < 0:
        out["status"][r] = NOTHING_ALLOWED
        return
    out["token"][r] = token
    logprobs = logits.double().log_softmax(0)
    if flags & LOGPROB or target >= 0:
        out["logprob"][r] = logprobs[token]
    top = min(int(args["row_top"][r]), len(logits))
    best = torch.sort(logits, descending=True, stable=True).indices[:top]
    out["top_ids"][r, :top] = best.int()
    out["top_logprobs"][r, :top] = logprobs[best].float()
    if target < 0:
        args["last_token"][slot] = token
        args["counts"][slot, token] += 1


def allowed(words: Tensor, vocab: int) -> Tensor:
    """A mask's bits, [vocab] bool."""
    ids = torch.arange(vocab)
    return (words[ids // 32] >> (ids % 32)) & 1 != 0


def _choose(r: int, args: dict[str, Any], logits: Tensor, slot: int, flags: int) -> int:
    """The token, -1 where the mask leaves none."""
    value = {
        n: float(args[n][r])
        for n in ("temperature", "top_p", "min_p", "frequency", "presence", "repetition")
    }
    z = logits
    if flags & PENALTIES:
        state = (args["counts"][slot, : len(z)], args["bias"][slot, : len(z)])
        z = penalized(logits, *state, value["frequency"], value["presence"], value["repetition"])
    if (mask := int(args["row_mask"][r])) >= 0:
        z = z.masked_fill(~allowed(args["masks"][mask], len(z)), -math.inf)
        if float(z.max()) == -math.inf:
            return -1
    if value["temperature"] < GREEDY_BELOW or not bool(torch.isfinite(z.max())):
        return int((z == z.max()).nonzero()[0])
    weights = kept_weights(
        z, value["temperature"], int(args["top_k"][r]), value["top_p"], value["min_p"]
    )
    cdf = weights.cumsum(0)
    draw = uniform(int(args["seed"][r]), int(args["positions"][int(args["row_token"][r])])) * float(
        cdf[-1]
    )
    return int((cdf > draw).nonzero()[0])


def _sample_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    rows, vocab = shapes["logits"]
    return Cost(read=rows * vocab * 4, written=rows * (16 + 8 * TOP), flops=2 * rows * vocab)


_ROW_DEFAULTS: dict[str, float] = {
    "row_target": -1,
    "row_flags": 0,
    "row_top": 0,
    "row_mask": -1,
    "top_k": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "frequency": 0.0,
    "presence": 0.0,
    "repetition": 1.0,
    "seed": 0,
}
_FLOAT_ROWS = ("temperature", "top_p", "min_p", "frequency", "presence", "repetition")


def make_sample(
    label: str, rows: list[dict[str, float]], *, vocab: int, columns: int, scale: float = 3.0
) -> Sample:
    """One sample with the given rows in a bucket of two more; columns beyond `vocab` hold values
    that must not win."""
    g = generator(61)
    n, size, slots = len(rows), len(rows) + 2, len(rows) + 3
    logits = floats(g, size, columns, used=n, scale=scale)
    logits[:, vocab:] = 1e9
    args: dict[str, Any] = {"live": live(2 * n, n, n), "logits": logits}
    for name, default in _ROW_DEFAULTS.items():
        values = [row.get(name, default) for row in rows]
        if name in _FLOAT_ROWS:
            args[name] = torch.tensor([*values, math.nan, math.nan])
        else:
            dtype = torch.int64 if name == "seed" else torch.int32
            args[name] = padded([int(v) for v in values], size, dtype)
    args["row_token"] = padded([2 * r + 1 for r in range(n)], size)
    args["row_slot"] = padded([slots - 1 - r for r in range(n)], size)
    args["positions"] = padded([5 + 7 * t for t in range(2 * n)], 2 * n + 1)
    args["masks"] = torch.full((size, -(-vocab // 32)), POISON, dtype=torch.int32)
    counts = torch.randint(0, 4, (slots, columns), generator=g) * torch.randint(
        0, 2, (slots, columns), generator=g
    )
    seen = torch.randint(0, 2, (slots, columns), generator=g) * SEEN
    args["counts"] = (counts | seen).int()
    args["bias"] = floats(g, slots, columns) * (torch.rand(slots, columns, generator=g) < 0.1)
    args["last_token"] = torch.full((slots,), -7, dtype=torch.int32)
    return Sample(label=label, args=args, attrs={"vocab": vocab})


def _sample_samples() -> list[Sample]:
    penalties: dict[str, float] = {
        "row_flags": PENALTIES,
        "frequency": 0.7,
        "presence": 0.4,
        "repetition": 1.3,
    }
    greedy = make_sample(
        "greedy",
        [
            {"temperature": 0.0},
            {"temperature": 0.0, "row_flags": LOGPROB, "row_top": 20},
            {**penalties, "temperature": 0.0, "row_top": 3},
            {"row_target": 17, "row_flags": LOGPROB},
        ],
        vocab=517,
        columns=528,
    )
    greedy.args["logits"][0, [100, 300, 511]] = 50.0  # a tie: the lowest id
    drawn = make_sample(
        "drawn",
        [
            *({"seed": float(s)} for s in (1, 2**62, -5)),
            *({"seed": s, "top_k": 5, "temperature": 1.7} for s in range(4)),
            *({"seed": s, "top_p": 0.8, "row_flags": LOGPROB} for s in range(4)),
            *({"seed": s, "min_p": 0.1, "temperature": 0.7} for s in range(3)),
            *({**penalties, "seed": s, "top_k": 40, "top_p": 0.9, "min_p": 0.02} for s in range(4)),
            {"top_k": 1},
            {"top_k": 100000, "top_p": 0.999999},
            {"top_p": 0.0},
        ],
        vocab=1000,
        columns=1000,
    )
    bad = make_sample(
        "bad logits", [{"temperature": 0.0}, {"seed": 3}, {"row_target": 3}], vocab=64, columns=64
    )
    bad.args["logits"][0, 63] = math.nan
    bad.args["logits"][1, 0] = math.inf
    # Flat logits over a vocabulary of several blocks: nothing is negligible.
    flat = make_sample(
        "flat",
        [
            {"seed": 1},
            {"top_p": 0.5},
            {"top_k": 3000},
            {"temperature": 0.0},
            {"top_k": 7000, "top_p": 0.9},
        ],
        vocab=9001,
        columns=9008,
        scale=0.01,
    )
    banned = make_sample("all banned", [{"row_flags": PENALTIES}], vocab=40, columns=48)
    banned.args["bias"][:] = -math.inf
    tiny = make_sample("tiny", [{"row_top": 20, "top_k": 2}], vocab=3, columns=16)
    return [greedy, drawn, bad, flat, banned, tiny, _masked_sample()]


def _masked_sample() -> Sample:
    """Constrained rows among others, in a vocabulary that is no multiple of 32."""
    penalties: dict[str, float] = {"row_flags": PENALTIES, "presence": 1.5, "repetition": 1.2}
    few, half, one, none, edge = 5, 3, 0, 7, 9
    rows: list[dict[str, float]] = [
        {"temperature": 0.0, "row_mask": few, "row_flags": LOGPROB, "row_top": 5},
        {"temperature": 0.0},
        {"seed": 1, "row_mask": half},
        {"seed": 2, "row_mask": few, "top_k": 40},  # more than are allowed
        {"seed": 3, "row_mask": half, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"seed": 4, "row_mask": one, "top_p": 0.5, "row_flags": LOGPROB},
        {"seed": 5, "row_mask": none, "row_top": 2, "row_flags": LOGPROB},
        {"temperature": 0.0, "row_mask": none},
        {"seed": 6, "row_mask": half, **penalties},
        {"seed": 7, "row_mask": few, "min_p": 0.3},
        {"seed": 8, "row_mask": edge, "temperature": 5.0},
        {"seed": 9, "row_mask": few, "top_p": 0.8},
        {"row_target": 17, "row_mask": none},
        {"seed": 10, "top_k": 5},
    ]
    sample = make_sample("masked", rows, vocab=1003, columns=1008)
    masks, g = sample.args["masks"], generator(62)
    choices = {
        few: [3, 31, 32, 500, 769],
        half: torch.randperm(1003, generator=g)[:500].tolist(),
        one: [640],
        none: [],
        edge: [0, 1002],
    }
    bits = torch.zeros(len(choices), masks.shape[1] * 32, dtype=torch.int64)
    bits[:, 1003:] = 1  # no tokens
    for row, ids in enumerate(choices.values()):
        bits[row, ids] = 1
    words = (bits.unflatten(1, (-1, 32)) << torch.arange(32)).sum(2)
    masks[list(choices)] = torch.where(words < 2**31, words, words - 2**32).int()
    return sample


def _row(name: str, dtype: str) -> Arg:
    return Arg(name=name, role="input", dims=("seqs",), dtypes=(dtype,))


SAMPLE = register(
    Op(
        name="sample",
        args=(
            LIVE,
            Arg(name="logits", role="input", dims=("seqs", "V"), dtypes=("float32",)),
            *(
                _row(n, "int32")
                for n in ("row_token", "row_slot", "row_target", "row_flags", "row_top", "row_mask")
            ),
            Arg(name="masks", role="input", dims=("M", "W"), dtypes=("int32",)),
            _row("top_k", "int32"),
            *(_row(n, "float32") for n in _FLOAT_ROWS),
            _row("seed", "int64"),
            Arg(name="positions", role="input", dims=("tokens",), dtypes=("int32",)),
            COUNTS,
            BIASES,
            Arg(name="last_token", role="state", dims=("slots",), dtypes=("int32",)),
            Arg(name="token", role="output", dims=("seqs",), dtypes=("int32",)),
            Arg(name="logprob", role="output", dims=("seqs",), dtypes=("float32",)),
            Arg(name="top_ids", role="output", dims=("seqs", "20"), dtypes=("int32",)),
            Arg(name="top_logprobs", role="output", dims=("seqs", "20"), dtypes=("float32",)),
            Arg(name="status", role="output", dims=("seqs",), dtypes=("int32",)),
        ),
        attrs={"vocab": int},
        reference=sample_reference,
        cost=_sample_cost,
        samples=_sample_samples,
    )
)
