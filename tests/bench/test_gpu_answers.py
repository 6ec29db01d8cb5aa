"""What `bench.gpu` found, in goals and answers: what is unmeasured stays so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stub_run import ROOT

from bench.errors import BenchUsage
from bench.gpu import answers, goals
from bench.gpu.documents import merged


def document(**figures: dict[str, Any]) -> dict[str, Any]:
    """Of figures by `section__model`."""
    names = {"main": goals.MAIN, "small": goals.SMALL, "": ""}
    pairs = [(key.partition("__"), value) for key, value in figures.items()]
    return {
        "sections": [
            {"section": section, "model": names[model], "figures": value}
            for (section, _, model), value in pairs
        ]
    }


def test_goals_say_what_holds_and_what_is_unmeasured() -> None:
    found = document(
        decode__main={"batch_1": {"ms": 3.9, "bound_pct": 80.0}},
        peers__main={"compiled_batch_1_ms": 4.68},
        calls__main={"peak_tflops": 800.0, "prefill": [{"tflops": 500.0, "torch_tflops": 600.0}]},
        prefill__main={"tokens_1024": {"tokens": 1024, "ms": 20.0}},
        restore__main={"all_plans_s": 0.23, "plans": 23, "slowest_plan_s": 0.011},
    )
    rows = {row["goal"]: row for row in goals.reached(found)}
    assert rows["8B bf16 decode, batch 1, ms"]["holds"] == "yes"
    assert rows["8B bf16 decode, batch 1, % of bandwidth bound"]["holds"] == "no"
    ratio = rows["torch.compile with static cache / ours, batch 1"]
    assert ratio["measured"] == pytest.approx(1.2) and ratio["holds"] == "yes"
    assert rows["36 graphs restored, ms (by the mean)"]["measured"] == pytest.approx(360)
    assert rows["slowest graph restored, ms"]["measured"] == pytest.approx(11)
    assert rows["1B bf16 decode, batch 1, ms"]["holds"] == "unmeasured"
    share = rows["8B bf16 prefill of 1024 tokens, % of the measured peak"]["measured"]
    assert 85 < share < 100  # 14.6 TFLOP at 800 are 18.3 ms
    text = goals.table(list(rows.values()))
    assert len(text.splitlines()) == len(goals.GOALS) + 1 and "unmeasured" in text


def test_runs_of_one_day_are_read_as_one(tmp_path: Path) -> None:
    """The last that found something counts; another GPU's are refused."""
    runs = [
        [{"section": "a", "model": "", "figures": {"x": 1}}, {"section": "b", "model": ""}],
        [{"section": "a", "model": ""}, {"section": "b", "model": "", "figures": {"x": 2}}],
    ]
    for number, sections in enumerate(runs):
        text = json.dumps({"hardware": "h200", "sections": sections})
        (tmp_path / f"{number}.json").write_text(text)
    paths = [str(tmp_path / f"{number}.json") for number in range(2)]
    assert [r["figures"] for r in merged(paths)["sections"]] == [{"x": 1}, {"x": 2}]
    (tmp_path / "2.json").write_text('{"hardware": "h100", "sections": []}')
    with pytest.raises(BenchUsage, match="results of different GPUs"):
        merged([*paths, str(tmp_path / "2.json")])
    with pytest.raises(BenchUsage, match=r"3\.json is no result of bench\.gpu"):
        merged([str(tmp_path / "3.json")])
    for program in ("goals", "answers"):
        command = [sys.executable, "-m", f"bench.gpu.{program}", *paths]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "unmeasured" in done.stdout or "open" in done.stdout


def test_every_open_question_is_answered_in_words() -> None:
    probes = {
        "cubin_abi": {
            "driver": 13000,
            "ours": {"elf_abi": 7, "right": True},
            "newer": {"elf_abi": 8, "right": False},
        },
        "tensor_maps": {"offset": 48, "right": True},
        "programmatic_edges": {
            "programmatic_right": True, "programmatic_us_per_node": 1.0, "full_us_per_node": 2.0,
        },
        "wished_addresses": {"alone": True, "with_torch": "an error"},
        "graph_cost": {"1000_make_us_per_node": 1.0, "5000_make_us_per_node": 1.5},
        "node_updates": {"us_per_node": 0.5},
        "clusters": {"with_attribute_right": True, "without_attribute": [3]},
        "torch_views": {
            "torch": "2", "array_interface": {"aliases": True, "right": True},
            "dlpack": {"refused": "no"},
        },
        "bindings": {"cuda_bindings": "13.0.1"},
    }  # fmt: skip
    contracts = {"cases": 9, "kernels": 3, "failed": 0}
    found = answers.answers(document(probes=probes, contracts=contracts))
    assert None not in found
    assert found[0] == "ABI 7: yes, ABI 8: NO (driver 13000); 9 cases of 3 kernels, 0 wrong"
    assert found[4] == "alone: yes; with torch: NO" and "DLPack: no" in str(found[7])
    assert answers.answers({"sections": []}) == [None] * len(answers.QUESTIONS)


def test_the_open_questions_are_those_of_the_docs() -> None:
    table = answers.table([None] * len(answers.QUESTIONS))
    docs = (ROOT / "docs" / "cuda.md").read_text("utf-8")
    for row in table.splitlines()[2:]:
        number, text, _, by = (part.strip() for part in row.strip("|").split("|"))
        assert f"| {number} | {text} |" in docs and f"| {by} |" in docs
