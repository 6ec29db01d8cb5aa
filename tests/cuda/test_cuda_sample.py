"""Sampling on CUDA beyond the op's samples: every way to the threshold gives the reference's token,
whatever the chunks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_harness import check_case, make_case, run_case
from rowwise_calls import MODELS, calls
from triton.runtime import interpreter

import kernels.cuda.register
import kernels.ops.register  # noqa: F401
from kernels.cuda import sample as sampling
from kernels.cuda.build import build_cuda
from kernels.cuda.code import sampling as device
from kernels.cuda.rows import PROCESSORS
from kernels.cuda.state import EditConfig
from kernels.kernel import KERNELS
from kernels.op import OPS, Sample
from kernels.ops.sample import LOGPROB, PENALTIES, make_sample
from kernels.ops.samples import floats, generator, live
from kernels.ops.state import BIAS, CLEAR, COUNT, MARK

SAMPLE, EDIT = (next(k for k in KERNELS["cuda"] if k.op == op) for op in ("sample", "edit"))
FILTERS: tuple[dict[str, float], ...] = (
    {"top_k": 7},
    {"top_p": 0.6},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"min_p": 0.2, "temperature": 0.3},
    {"top_p": 0.9, "temperature": 0.05},
    {"top_k": 30, "row_flags": PENALTIES, "frequency": 0.5, "repetition": 1.2},
)


def logits(kind: str, rows: int, vocab: int) -> torch.Tensor:
    g = generator(7)
    if kind == "peaked":
        return floats(g, rows, vocab) * 4
    if kind == "even":
        return floats(g, rows, vocab) * 1e-3
    if kind == "tied":  # thresholds fall among equal values
        return torch.randint(-3, 3, (rows, vocab), generator=g).float()
    if kind == "constant":
        return torch.full((rows, vocab), -0.5)
    if kind == "apart":  # what decides is a tenth of the vocabulary
        near = torch.rand(rows, vocab, generator=g) < 0.1
        return torch.where(near, floats(g, rows, vocab), -40.0 + floats(g, rows, vocab) * 9)
    return floats(g, rows, vocab) + 900.0  # far from zero


def sample_of(kind: str, vocab: int) -> Sample:
    rows = [{**f, "seed": 11.0 * i + 1} for i, f in enumerate(FILTERS)]
    sample = make_sample(kind, rows, vocab=vocab, columns=vocab)
    sample.args["logits"][: len(rows)] = logits(kind, len(rows), vocab)
    return sample


def test_both_sides_have_the_same_constants() -> None:
    for name in ("TOP_TILE", "WORDS", "REALS"):
        assert getattr(sampling, name) == getattr(device, name).value


@pytest.mark.parametrize(("chunk", "steps"), [(256, 1), (256, 4), (2048, 1)])
@pytest.mark.parametrize("kind", ["peaked", "even", "tied", "constant", "far", "apart"])
def test_thresholds(kind: str, chunk: int, steps: int) -> None:
    case = make_case(OPS["sample"], sample_of(kind, 1500), "float32")
    warps = chunk // 256
    run_case(SAMPLE, case, sampling.SampleConfig(chunk=chunk, steps=steps, tile=256, warps=warps))
    check_case(case)


PLAIN: tuple[dict[str, float], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "row_flags": LOGPROB, "row_top": 2},
    {"row_target": 17, "row_flags": LOGPROB},
    {"temperature": 1.3, "seed": 5},
    {"temperature": 1.3, "seed": 6, "row_flags": PENALTIES, "frequency": 0.5},
)


def test_rows_are_read_once_and_filtered_ones_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load of the interpreter, counted at its address. Beyond the passes a row may read the
    sample that places its bins, once a program, and the chunk in which its token lies."""
    rows = (*PLAIN, *FILTERS)
    sample = make_sample("passes", list(rows), vocab=9001, columns=9008)
    case = make_case(OPS["sample"], sample, "float32")
    config = sampling.SampleConfig(chunk=1024, steps=2, tile=512, warps=8)
    logits = case.memory["logits"]
    loads = np.zeros(logits.numel(), dtype=np.int64)
    load = interpreter.InterpreterBuilder.create_masked_load

    def counted(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        at = (pointers.data[mask.data].astype(np.int64) - logits.data_ptr()) // 4
        np.add.at(loads, at[(at >= 0) & (at < len(loads))], 1)
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counted)
    run_case(SAMPLE, case, config)
    check_case(case)
    programs = SAMPLE.launches(case.call, config)[0].grid[0]
    for r, row in enumerate(loads.reshape(logits.shape)):
        passes = 0 if r >= len(rows) else 1 if r < len(PLAIN) else 2
        beyond = {0: 0, 1: config.chunk + 1, 2: config.chunk + 1 + programs * 1024}[passes]
        assert np.median(row[:9001]) == passes
        assert passes * 9001 <= row.sum() <= passes * 9001 + beyond


@pytest.mark.parametrize("k", [15, 16, 40, 60, 61])
def test_few_best_of_a_mask(k: int) -> None:
    """60 tokens in 15 fours: their maxima alone do not say whether there are k."""
    rows: list[dict[str, float]] = [
        {"top_k": k, "seed": 1.0},
        {"top_k": k, "seed": 2.0, "top_p": 0.7, "temperature": 2.0},
        {"top_k": k, "seed": 3.0, "top_p": 0.95, "min_p": 0.05},
    ]
    sample = make_sample("few", [{**row, "row_mask": 0} for row in rows], vocab=1500, columns=1500)
    sample.args["masks"][0] = 0
    sample.args["masks"][0, 9:11] = torch.tensor([-1, (1 << 28) - 1])  # 288 to 347
    case = make_case(OPS["sample"], sample, "float32")
    run_case(SAMPLE, case, sampling.SampleConfig(chunk=256, steps=2, tile=256, warps=1))
    check_case(case)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_candidates_are_few_in_a_large_vocabulary(temperature: float) -> None:
    """Where the bins leave more than there is room for, the row itself would be searched."""
    rows: list[dict[str, float]] = [
        {"top_p": 0.9}, {"top_p": 0.5}, {"top_p": 0.99}, {"top_k": 50, "top_p": 0.9},
        {"top_k": 5000, "top_p": 0.9}, {"top_k": 2000}, {"min_p": 0.05},
    ]  # fmt: skip
    given = [{**row, "seed": 1.0, "temperature": temperature} for row in rows]
    sample = make_sample("large", given, vocab=128256, columns=128256)
    case = make_case(OPS["sample"], sample, "float32")
    config = sampling.SampleConfig(chunk=4096, steps=16, tile=1024, warps=8)
    scratch = run_case(SAMPLE, case, config)
    check_case(case)
    start = sampling._place(case.call, config)[0]["words_ptr"].offset
    words = scratch[start : start + 4 * sampling.WORDS * len(rows)].view(torch.int32)
    candidates = words.reshape(-1, sampling.WORDS)[:, device.CANDIDATES.value]
    assert int(candidates.max()) <= sampling.ROOM and int(candidates[0]) > 0


def test_a_bad_row_with_a_filter_is_told() -> None:
    rows = [{**f, "seed": 1.0} for f in FILTERS]
    sample = make_sample("bad", rows, vocab=1500, columns=1500)
    for r, value in enumerate((math.nan, math.inf, -math.inf, math.nan)):
        sample.args["logits"][r, 3 + 400 * (r % 2)] = value
    case = make_case(OPS["sample"], sample, "float32")
    run_case(SAMPLE, case, sampling.SampleConfig(chunk=256, steps=2, tile=256, warps=1))
    check_case(case)


@pytest.mark.parametrize("rows", [1, 64, 256])
def test_two_launches_fill_the_processors(rows: int) -> None:
    (call,) = (c for c in calls(MODELS["llama3-8b"], "decode", rows, rows) if c.op == "sample")
    launches = SAMPLE.launches(call, SAMPLE.default(call))
    assert [launch.source.function for launch in launches if launch.source] == [
        "sample_scan.scan_kernel",
        "sample_collect.collect_kernel",
    ]
    for launch in launches:
        programs = math.prod(launch.grid)
        assert programs == 63 or programs >= 7 * PROCESSORS


@pytest.mark.parametrize("kind", ["peaked", "tied"])
def test_more_candidates_than_room(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row itself is searched."""
    monkeypatch.setattr(sampling, "ROOM", 2)
    case = make_case(OPS["sample"], sample_of(kind, 300), "float32")
    run_case(SAMPLE, case, sampling.SampleConfig(chunk=256, steps=1, tile=256, warps=1))
    check_case(case)


def test_edits_keep_their_order_across_tiles() -> None:
    g = generator(8)
    slots, vocab = 3, 40
    rows: list[list[int]] = []
    for n in range(90):
        kind = [MARK, COUNT, BIAS, COUNT, BIAS, MARK, CLEAR][n % 7]
        pair = [int(torch.randint(0, limit, (), generator=g)) for limit in (slots, vocab // 8)]
        rows.append([*pair, kind, n + 1 if kind != BIAS else 1065353216 + n])
    args: dict[str, Any] = {
        "live": live(edits=len(rows)),
        "edits": torch.tensor(rows, dtype=torch.int32),
        "counts": torch.ones(slots, vocab, dtype=torch.int32),
        "bias": floats(g, slots, vocab),
    }
    case = make_case(OPS["edit"], Sample(label="order", args=args, attrs={}), "float32")
    for tile in (4, 16, 128):
        fresh = replace(case, memory={n: t.clone() for n, t in case.memory.items()})
        run_case(EDIT, fresh, EditConfig(block=16, tile=tile, warps=4))
        check_case(fresh)


def test_angles_are_exact_at_every_position() -> None:
    """Against float64, at positions where a float32 reduction has no digit left."""
    positions = torch.tensor([1, 4095, 65536, 131071, 1048575], dtype=torch.int32)
    freq = 10000.0 ** (-torch.arange(0, 64, 2).float() / 64)
    args = {"live": live(len(positions)), "positions": positions, "inv_freq": freq}
    sample = Sample(label="far", args=args, attrs={"scale": 1.0, "variants": 1})
    case = make_case(OPS["rope_table"], sample, "float32")
    run_case(next(k for k in KERNELS["cuda"] if k.op == "rope_table"), case)
    angle = (positions.float()[:, None] * freq).double()
    want = torch.cat((angle.cos(), angle.sin()), dim=1)
    assert (case.memory["out"].double() - want).abs().max() < 2.5e-7  # two units of float32 at 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("model", sorted(MODELS))
def test_registers_leave_room_for_two_programs(model: str, rows: int, tmp_path: Path) -> None:
    (call,) = (c for c in calls(MODELS[model], "decode", rows, rows) if c.op == "sample")
    made = [launch.source for launch in SAMPLE.launches(call, SAMPLE.default(call))]
    for source, (binary, _) in build_cuda([s for s in made if s], tmp_path).items():
        assert binary.registers <= 128 and binary.stack == 0, source.function
