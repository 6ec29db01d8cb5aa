"""Sampling on CUDA beyond the op's samples: every way to the threshold gives the reference's token,
whatever the chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_harness import check_case, make_case, run_case
from rowwise_calls import MODELS, calls

import kernels.cuda.register
import kernels.ops.register  # noqa: F401
from kernels.cuda import sample as sampling
from kernels.cuda.build import build_cuda
from kernels.cuda.state import EditConfig
from kernels.kernel import KERNELS
from kernels.op import OPS, Sample
from kernels.ops.sample import PENALTIES, make_sample
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
    return floats(g, rows, vocab) + 900.0  # far from zero


def sample_of(kind: str, vocab: int) -> Sample:
    rows = [{**f, "seed": 11.0 * i + 1} for i, f in enumerate(FILTERS)]
    sample = make_sample(kind, rows, vocab=vocab, columns=vocab)
    sample.args["logits"][: len(rows)] = logits(kind, len(rows), vocab)
    return sample


@pytest.mark.parametrize("chunk", [256, 2048])
@pytest.mark.parametrize("kind", ["peaked", "even", "tied", "constant", "far"])
def test_thresholds(kind: str, chunk: int) -> None:
    case = make_case(OPS["sample"], sample_of(kind, 1500), "float32")
    run_case(SAMPLE, case, sampling.SampleConfig(chunk=chunk, tile=256, warps=8))
    check_case(case)


@pytest.mark.parametrize("kind", ["peaked", "tied"])
def test_more_candidates_than_room(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row itself is searched."""
    monkeypatch.setattr(sampling, "ROOM", 2)
    case = make_case(OPS["sample"], sample_of(kind, 300), "float32")
    run_case(SAMPLE, case, sampling.SampleConfig(chunk=256, tile=256, warps=8))
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
@pytest.mark.parametrize("model", sorted(MODELS))
def test_registers_leave_room_for_two_programs(model: str, tmp_path: Path) -> None:
    (call,) = (c for c in calls(MODELS[model], "decode", 64, 64) if c.op == "sample")
    made = [launch.source for launch in SAMPLE.launches(call, SAMPLE.default(call))]
    for source, (binary, _) in build_cuda([s for s in made if s], tmp_path).items():
        assert binary.registers <= 128 and binary.stack == 0, source.function
