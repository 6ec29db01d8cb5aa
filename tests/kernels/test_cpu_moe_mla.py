"""CPU kernels of experts and latent attention: a token's bits do not depend on its batch, its chunk
or the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from harness import GROUP, Case, make_case, with_args

import kernels.cpu.register
import kernels.ops.register  # noqa: F401
from kernels.cpu.run import Team, run_on
from kernels.kernel import KERNELS, Kernel
from kernels.op import Sample
from kernels.ops.embed import live_rows
from kernels.ops.mla import HEAD_LINEAR, MLA_ATTENTION
from kernels.ops.moe import MOE_DOWN, MOE_GATE_UP
from kernels.ops.route import ROUTE, expert_order_reference
from kernels.toolchain import supported_levels

KERNEL = {k.name: k for k in KERNELS["cpu"]}
FORMATS = {
    "f32": "float32",
    "bf16": "bfloat16",
    "int8": f"int8g{GROUP}",
    "int4": f"int4g{GROUP}",
}


@pytest.fixture(scope="module", params=[v.name for v in supported_levels()])
def teams(request: pytest.FixtureRequest) -> Iterator[dict[int, Team]]:
    with Team(request.param, 1) as one, Team(request.param, 3) as three:
        yield {1: one, 3: three}


def outputs(team: Team, kernel: Kernel, case: Case) -> dict[str, np.ndarray]:
    arrays = {n: a.copy() for n, a in case.arrays.items()}
    run_on(team, kernel, case.call, arrays)
    return arrays


def live(tokens: int) -> torch.Tensor:
    return torch.tensor([tokens, 1, 1, 0, 0, 0, 0, 0], dtype=torch.int32)


def pair_ids(s: Sample) -> torch.Tensor:
    """The expert of every pair, from the order."""
    n = live_rows(s.args, s.attrs)
    ids = torch.zeros(n * s.args["order"].shape[1], dtype=torch.int32)
    starts, order = s.args["starts"].tolist(), s.args["order"].flatten()
    for e in range(len(starts) - 1):
        ids[order[starts[e] : starts[e + 1]].long()] = e
    return ids.view(n, -1)


@pytest.mark.parametrize("op", [MOE_GATE_UP, MOE_DOWN], ids=lambda op: op.name)
@pytest.mark.parametrize("suffix", FORMATS)
def test_an_experts_row_is_the_same_in_every_batch(teams: dict[int, Team], op, suffix: str) -> None:
    s = next(s for s in op.samples() if s.label == "crowded")
    kernel = KERNEL[f"{op.name}_{suffix}"]
    case = make_case(op, s, FORMATS[suffix])
    n, ids = live_rows(s.args, s.attrs), pair_ids(s)
    want = outputs(teams[1], kernel, case)["out"][:n]
    np.testing.assert_array_equal(outputs(teams[3], kernel, case)["out"][:n], want)
    experts = len(s.args["starts"]) - 1
    for t0, t1 in ((0, 1), (7, 8), (12, 23), (20, 50)):
        part = t1 - t0
        placed = expert_order_reference(
            {"live": live(part), "ids": ids[t0:t1]}, {"experts": experts}
        )
        smaller = with_args(s, live=live(part), x=s.args["x"][t0:t1].clone(), **placed)
        got = outputs(teams[3], kernel, make_case(op, smaller, FORMATS[suffix]))["out"]
        np.testing.assert_array_equal(got, want[t0:t1])


@pytest.mark.parametrize("s", ROUTE.samples(), ids=lambda s: s.label)
def test_a_tokens_experts_are_the_same_in_every_batch(teams: dict[int, Team], s: Sample) -> None:
    case, n = make_case(ROUTE, s), live_rows(s.args, s.attrs)
    want = outputs(teams[1], KERNEL["route"], case)
    for t in range(n):
        one = with_args(s, live=live(1), logits=s.args["logits"][t : t + 1].clone())
        got = outputs(teams[3], KERNEL["route"], make_case(ROUTE, one))
        for name in ("ids", "weights"):
            np.testing.assert_array_equal(got[name][0], want[name][t])


@pytest.mark.parametrize("suffix", FORMATS)
def test_head_linear_row_by_row(teams: dict[int, Team], suffix: str) -> None:
    s = next(s for s in HEAD_LINEAR.samples() if s.label == "value")
    kernel, n = KERNEL[f"head_linear_{suffix}"], live_rows(s.args, s.attrs)
    want = outputs(teams[1], kernel, make_case(HEAD_LINEAR, s, FORMATS[suffix]))["out"]
    for t0, t1 in ((0, 1), (3, 4), (2, 11), (9, n)):
        part = with_args(s, live=live(t1 - t0), x=s.args["x"][t0:t1].clone())
        got = outputs(teams[3], kernel, make_case(HEAD_LINEAR, part, FORMATS[suffix]))["out"]
        np.testing.assert_array_equal(got, want[t0:t1])


def chunk(s: Sample, seq: int, start: int, stop: int, pages: int) -> Sample:
    """Tokens start..stop-1 (0 is the first of the step) of one sequence, alone in a bucket."""
    first, last = s.args["seq_start"][seq : seq + 2].tolist()
    length = int(s.args["seq_len"][seq]) - (last - first) + stop
    table = torch.full((1, pages), 2**30, dtype=torch.int32)
    table[0, : -(-length // 16)] = s.args["pages"][seq, : -(-length // 16)]
    return with_args(
        s,
        live=live(stop - start),
        q=s.args["q"][first + start : first + stop].clone(),
        seq_start=torch.tensor([0, stop - start], dtype=torch.int32),
        seq_len=torch.tensor([length], dtype=torch.int32),
        pages=table,
    )


@pytest.mark.parametrize("label", ["few heads", "many heads", "bf16", "long decode"])
def test_latent_attention_bits_do_not_depend_on_the_batch(
    teams: dict[int, Team], label: str
) -> None:
    """The whole batch on 1 and 3 threads, with and without split blocks; then in uneven chunks."""
    s = next(s for s in MLA_ATTENTION.samples() if s.label == label)
    kernel = KERNEL[f"mla_attention_{'bf16' if s.attrs['kv_dtype'] == 'bfloat16' else 'f32'}"]
    whole = replace(kernel, scalars=lambda call: {**kernel.scalars(call), "room": 0})
    case, n = make_case(MLA_ATTENTION, s), live_rows(s.args, s.attrs)
    want = outputs(teams[1], kernel, case)["out"][:n]
    for team, variant in ((teams[3], kernel), (teams[3], whole), (teams[1], whole)):
        np.testing.assert_array_equal(outputs(team, variant, case)["out"][:n], want)
    for seq in range(int(s.args["live"][1])):
        first, last = s.args["seq_start"][seq : seq + 2].tolist()
        cuts = sorted({c for c in (0, 1, 8, 9, 30, last - first) if c <= last - first})
        for start, stop in pairwise(cuts):
            part = make_case(MLA_ATTENTION, chunk(s, seq, start, stop, pages=66 + seq))
            got = outputs(teams[3], kernel, part)["out"]
            np.testing.assert_array_equal(got, want[first + start : first + stop])


@pytest.mark.parametrize(
    ("kernel", "sample", "change", "words"),
    [
        ("route", ROUTE.samples()[0], {"score": "cosine"}, "cosine"),
        ("route", ROUTE.samples()[0], {"groups": 3}, "8 experts"),
        ("route", ROUTE.samples()[0], {"groups": 8, "kept_groups": 1}, "fewer than 2"),
        ("mla_attention_f32", MLA_ATTENTION.samples()[0], {"latent": 24}, "latent 24"),
        ("mla_attention_f32", MLA_ATTENTION.samples()[0], {"rotary": 1024}, "1024"),
        ("moe_gate_up_f32", MOE_GATE_UP.samples()[0], {"act": "tanh"}, "tanh"),
    ],
)
def test_refusals_say_why(kernel: str, sample: Sample, change: dict, words: str) -> None:
    op = {"route": ROUTE, "moe_gate_up_f32": MOE_GATE_UP}.get(kernel, MLA_ATTENTION)
    call = make_case(op, sample, "float32").call
    reason = KERNEL[kernel].accepts(replace(call, attrs={**call.attrs, **change}))
    assert reason is not None and words in reason
