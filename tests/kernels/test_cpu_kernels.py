"""Every CPU kernel at every level this machine runs, on every sample of its op, against the
reference; and bit-exact independence of batch, chunking and threads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness import Case, cases, check_case, formats, make_case, with_args

import kernels.cpu.register
import kernels.ops.register  # noqa: F401
from kernels.cpu.layout import WIDENED
from kernels.cpu.run import Team, run_on
from kernels.kernel import KERNELS, CallShape, Kernel
from kernels.op import OPS, Sample
from kernels.ops.attention import ATTENTION, attention_sample
from kernels.ops.kv import KvState
from kernels.ops.linear_rope_kv import (
    FEW,
    LINEAR_ROPE_KV,
    MORE,
    linear_rope_kv_sample,
    rope_kv_attrs,
)
from kernels.ops.rope import ROPE_KV
from kernels.ops.sample import SAMPLE
from kernels.ops.samples import Ragged
from kernels.toolchain import supported_levels

KERNEL = {k.name: k for k in KERNELS["cpu"]}
LEVELS = [v.name for v in supported_levels()]

# Quantized linears also quantize activations, and tile instructions round them to bf16:
# test_cpu_linear.py has the exact bounds.
SLACK = {
    f"{op}_{suffix}": slack
    for op in ("linear", "linear_rope_kv", "head_linear", "moe_gate_up", "moe_down")
    for suffix, slack in (("bf16", 400.0), ("int8", 800.0), ("int4", 800.0))
}


@pytest.fixture(scope="module", params=LEVELS)
def teams(request: pytest.FixtureRequest) -> Iterator[dict[int, Team]]:
    with (
        Team(request.param, 1) as one,
        Team(request.param, 2) as two,
        Team(request.param, 3) as three,
    ):
        yield {1: one, 2: two, 3: three}


@functools.cache
def all_cases(op: str) -> list[tuple[str, Case]]:
    return list(cases(OPS[op]))


@pytest.mark.parametrize("name", sorted(KERNEL))
def test_kernel_equals_reference(teams: dict[int, Team], name: str) -> None:
    kernel = KERNEL[name]
    served = 0
    for label, case in all_cases(kernel.op):
        if kernel.accepts(case.call) is not None:
            continue
        served += 1
        for team in teams.values():
            fresh = replace(case, arrays={n: a.copy() for n, a in case.arrays.items()})
            run_on(team, kernel, fresh.call, fresh.arrays)
            try:
                check_case(fresh, SLACK.get(name, 1.0))
            except AssertionError as error:
                raise AssertionError(f"{name} on {label}: {error}") from error
    assert served, f"no sample of {kernel.op} is accepted by {name}"


READERS = sorted({k.op for k in KERNELS["cpu"] if any(p.endswith(".data") for p in k.params)})


@pytest.mark.parametrize("op", READERS)
def test_widened_weights_give_the_bits_of_float32_ones(teams: dict[int, Team], op: str) -> None:
    """Of every kernel that reads matrices, on the same bfloat16 numbers stored in both forms."""
    matrices = [a.name for a in OPS[op].args if a.role == "weight" and len(a.dims) > 1]
    for sample in OPS[op].samples():
        if sample.attrs.get("x_format") or sample.wanted:
            continue  # for GPUs
        given = {n: v.bfloat16().float() for n, v in sample.args.items() if n in matrices}
        whole = make_case(OPS[op], with_args(sample, **given), "float32")
        narrow = make_case(OPS[op], with_args(sample, **given), WIDENED)
        stored = [case.arrays[f"{matrices[0]}.data"].nbytes for case in (whole, narrow)]
        assert stored[1] < stored[0]
        forms = [(whole, whole.call), (narrow, narrow.call)]
        if len(matrices) > 1:  # each in its own form
            mixed = {matrices[0]: "float32", matrices[1]: WIDENED}
            data = {f"{matrices[0]}.data": whole.arrays[f"{matrices[0]}.data"]}
            both = replace(narrow, arrays=narrow.arrays | data)
            forms.append((both, replace(narrow.call, formats=mixed)))
        for team in teams.values():
            found = []
            for case, call in forms:
                arrays = run_sample(team, accepted(call), replace(case, call=call))
                found.append(b"".join(arrays[name].tobytes() for name in case.expected))
            assert len(set(found)) == 1, f"{op} {sample.label}"


def test_every_op_has_a_kernel_for_every_sample() -> None:
    """But products of fp8 activations and what serves them, which only GPUs compute."""
    for op in OPS.values():
        for label, case in all_cases(op.name):
            refusals = [k.accepts(case.call) for k in KERNELS["cpu"] if k.op == op.name]
            if case.call.attrs.get("x_format") or case.sample.wanted:
                assert any("GPU with fp8" in (reason or "") for reason in refusals), label
                assert None not in refusals
            else:
                assert None in refusals, f"{op.name} {label}: {refusals}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 24}, "head_dim 24"),
        ({"head_dim": 272}, "head_dim 272"),
        ({"v_head_dim": 8}, "v_head_dim 8"),
        ({"page_size": 32}, "page_size 32"),
        ({"kv_dtype": "float16"}, "float16"),
        ({"kv_heads": 4}, "6 heads"),
    ],
)
def test_refusals_say_why(change: dict[str, int | str], words: str) -> None:
    call = make_case(ATTENTION, ATTENTION.samples()[0]).call
    refused = replace(call, attrs={**call.attrs, **change})
    reason = KERNEL["attention_f32"].accepts(refused)
    assert reason is not None and words in reason


def run_sample(team: Team, kernel: Kernel, case: Case) -> dict[str, np.ndarray]:
    arrays = {n: a.copy() for n, a in case.arrays.items()}
    run_on(team, kernel, case.call, arrays)
    return arrays


def one_sequence(s: Sample, seq: int, tokens: range, pages: int) -> Sample:
    """Only the given tokens of one sequence (token 0 is the first of the step), in a bucket of
    their own."""
    first, last = s.args["seq_start"][seq : seq + 2].tolist()
    length = int(s.args["seq_len"][seq]) - (last - first) + tokens.stop
    n = len(tokens)
    table = torch.full((1, pages), 2**30, dtype=torch.int32)
    used = -(-length // 16)
    table[0, :used] = s.args["pages"][seq, :used]
    return with_args(
        s,
        live=torch.tensor([n, 1, 1, 0, 0, 0, 0, 0], dtype=torch.int32),
        q=s.args["q"][first + tokens.start : first + tokens.stop].clone(),
        seq_start=torch.tensor([0, n], dtype=torch.int32),
        seq_len=torch.tensor([length], dtype=torch.int32),
        pages=table,
    )


@pytest.mark.parametrize(
    "label",
    ["gqa", "bf16", "window", "mqa", "softcap", "sinks", "alibi", "logn", "everything", "e4m3"],
)
def test_attention_bits_do_not_depend_on_the_batch(teams: dict[int, Team], label: str) -> None:
    """Whole batch on 1, 2, 3 threads, with and without split blocks; then token by token and in
    uneven chunks."""
    s = next(s for s in ATTENTION.samples() if s.label == label)
    kernel = KERNEL["attention_bf16" if s.attrs["kv_dtype"] == "bfloat16" else "attention_f32"]
    whole = replace(kernel, scalars=lambda call: {**kernel.scalars(call), "room": 0})
    case = make_case(ATTENTION, s)
    live = int(s.args["live"][0])
    want = run_sample(teams[1], kernel, case)["out"][:live]
    for team, variant in ((teams[2], kernel), (teams[3], kernel), (teams[2], whole)):
        np.testing.assert_array_equal(run_sample(team, variant, case)["out"][:live], want)
    for seq in range(int(s.args["live"][1])):
        first, last = s.args["seq_start"][seq : seq + 2].tolist()
        cuts = sorted({0, *range(last - first)} if last - first < 20 else {0, 1, 8, 9, 30})
        for start, stop in zip(cuts, [*cuts[1:], last - first], strict=True):
            part = make_case(ATTENTION, one_sequence(s, seq, range(start, stop), pages=66 + seq))
            got = run_sample(teams[2], kernel, part)["out"]
            np.testing.assert_array_equal(
                got, want[first + start : first + stop], err_msg=f"sequence {seq} from {start}"
            )


def test_rope_kv_bits_do_not_depend_on_the_batch(teams: dict[int, Team]) -> None:
    s = next(s for s in ROPE_KV.samples() if s.label == "norms")
    kernel = KERNEL["rope_kv"]
    case = make_case(ROPE_KV, s)
    want = run_sample(teams[1], kernel, case)
    pool = case.arrays["kv"]
    for t in range(int(s.args["live"][0])):
        token = {n: s.args[n][t : t + 1].clone() for n in ("qkv", "kv_slots", "table")}
        live = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.int32)
        one = make_case(ROPE_KV, with_args(s, live=live, kv=KvState(s.args["kv"].pages), **token))
        one.arrays["kv"] = pool
        got = run_sample(teams[3], kernel, one)
        np.testing.assert_array_equal(got["q"][0], want["q"][t])
        pool = got["kv"]
    np.testing.assert_array_equal(pool, want["kv"])


def accepted(call: CallShape) -> Kernel:
    (kernel,) = [k for k in KERNELS["cpu"] if k.op == call.op and k.accepts(call) is None]
    return kernel


def in_two_calls(team: Team, case: Case) -> dict[str, np.ndarray]:
    """`linear_rope_kv` as `linear`, then `rope_kv`."""
    arrays = {n: a.copy() for n, a in case.arrays.items()}
    between = (case.call.shapes["x"][0], case.call.shapes["w"][0])
    qkv = np.zeros(between, np.float32)
    for op, name, attrs in (
        ("linear", "out", case.call.attrs),
        ("rope_kv", "qkv", rope_kv_attrs(dict(case.call.attrs))),
    ):
        shapes, dtypes = {**case.call.shapes, name: between}, {**case.call.dtypes, name: "float32"}
        call = replace(case.call, op=op, shapes=shapes, dtypes=dtypes, attrs=attrs)
        run_on(team, accepted(call), call, arrays | {name: qkv})
    return arrays


# One, two and more tiles to a head, heads and tiles that part at different places.
PROJECTIONS = (
    *(s for s in LINEAR_ROPE_KV.samples() if not s.attrs["x_format"]),
    *(
        linear_rope_kv_sample(
            400 + dim, f"heads of {dim}", ragged, inputs=64, heads=3, kv_heads=1, dim=dim, rotary=16
        )
        for ragged in (FEW, MORE)
        for dim in (80, 112, 256)
    ),
)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fmt", formats(LINEAR_ROPE_KV))
def test_a_projection_into_the_cache_has_the_bits_of_two_calls(level: str, fmt: str) -> None:
    """On any number of threads: with 7 and 24 a head lies in several shares, or some have none."""
    for threads in (1, 2, 3, 7, 24):
        with Team(level, threads) as team:
            for sample in PROJECTIONS:
                case = make_case(LINEAR_ROPE_KV, sample, fmt)
                want = in_two_calls(team, case)
                got = run_sample(team, accepted(case.call), case)
                for name in ("q", "kv"):
                    what = f"{sample.label}, {threads} threads: {name}"
                    np.testing.assert_array_equal(got[name], want[name], err_msg=what)


@pytest.mark.parametrize("change", [{"act": "gelu"}, {"scale": 0.5}, {"softcap": 1.0}])
def test_only_a_plain_projection_goes_into_the_cache(change: dict[str, str | float]) -> None:
    call = make_case(LINEAR_ROPE_KV, PROJECTIONS[0], "float32").call
    assert accepted(call).name == "linear_rope_kv_f32"
    refused = replace(call, attrs={**call.attrs, **change})
    ((name, value),) = change.items()
    assert f"{name}={value!r}" in (KERNEL["linear_rope_kv_f32"].accepts(refused) or "")


@pytest.mark.parametrize("label", ["greedy", "drawn", "flat"])
def test_sample_bits_do_not_depend_on_the_batch(teams: dict[int, Team], label: str) -> None:
    s = next(s for s in SAMPLE.samples() if s.label == label)
    kernel = KERNEL["sample"]
    case = make_case(SAMPLE, s)
    want = run_sample(teams[1], kernel, case)
    outputs = ("token", "logprob", "top_ids", "top_logprobs", "status")
    for team in (teams[2], teams[3]):
        got = run_sample(team, kernel, case)
        for name in (*outputs, "counts", "last_token"):
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    per_row = [a.name for a in SAMPLE.args if a.role == "input" and a.dims[0] == "seqs"]
    for r in range(int(s.args["live"][2])):
        rows = {n: s.args[n][r : r + 1].clone() for n in per_row}
        live = torch.tensor([2, 1, 1, 0, 0, 0, 0, 0], dtype=torch.int32)
        got = run_sample(teams[2], kernel, make_case(SAMPLE, with_args(s, live=live, **rows)))
        for name in outputs:
            np.testing.assert_array_equal(got[name][0], want[name][r], err_msg=f"row {r} {name}")


def dense_attention(case: Case) -> np.ndarray:
    """float64, one query at a time."""
    a, attrs = case.sample.args, case.sample.attrs
    layers = [layer.double().numpy() for layer in a["kv"].keys_and_values(attrs)]
    group, dim, v_dim = attrs["heads"] // attrs["kv_heads"], attrs["head_dim"], attrs["v_head_dim"]
    out = np.zeros((len(a["q"]), attrs["heads"] * v_dim))
    for s in range(int(a["live"][1])):
        first, last = a["seq_start"][s : s + 2].tolist()
        for t in range(first, last):
            position = int(a["seq_len"][s]) - last + t
            low = max(0, position + 1 - attrs["window"]) if attrs["window"] else 0
            keys = [(int(a["pages"][s, p // 16]), p % 16) for p in range(low, position + 1)]
            for head in range(attrs["heads"]):
                k, v = (
                    np.stack([layer[page, head // group, o] for page, o in keys])
                    for layer in layers
                )
                q = a["q"][t, head * dim : (head + 1) * dim].double().numpy()
                w = k @ q * attrs["scale"]
                w = np.exp(w - w.max())
                out[t, head * v_dim : (head + 1) * v_dim] = w @ v / w.sum()
    return out


@pytest.mark.parametrize("seed", range(6))
def test_attention_on_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = tuple(
        (int(rng.integers(0, 400)), int(rng.choice([1, 1, 1, 2, 30]))) for _ in range(5)
    )
    tokens = sum(new for _, new in lengths)
    ragged = Ragged(lengths=lengths, tokens=tokens + 3, seqs=7, pages=28, pool_pages=140)
    kv_heads = int(rng.integers(1, 4))
    s = attention_sample(
        100 + seed,
        "random",
        ragged,
        heads=kv_heads * int(rng.integers(1, 8)),
        kv_heads=kv_heads,
        dim=int(rng.integers(1, 13)) * 16,
        values=int(rng.integers(1, 17)) * 16,
        window=int(rng.choice([0, 0, 1, 130])),
        dtype=str(rng.choice(["float32", "bfloat16"])),
    )
    case = make_case(ATTENTION, s)
    kernel = KERNEL["attention_bf16" if s.attrs["kv_dtype"] == "bfloat16" else "attention_f32"]
    with Team(LEVELS[-1], 2) as team:
        got = run_sample(team, kernel, case)["out"]
    np.testing.assert_allclose(got[:tokens], dense_attention(case)[:tokens], atol=3e-5)


def test_accepts_reads_only_what_a_call_has() -> None:
    """A kernel asked about any call of its op answers with a reason or None, never an exception."""
    for op in OPS.values():
        for _, case in all_cases(op.name):
            call: CallShape = replace(case.call, formats={n: "int3" for n in case.call.formats})
            for kernel in KERNELS["cpu"]:
                if kernel.op == op.name:
                    answer = kernel.accepts(call)
                    assert answer is None or answer
