"""Tuning without a GPU: the whole program on the stub driver, and what its records do to a
compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from cuda_stub import build, load
from toy_specs import toy, toy_config

from compiler.design import draft, nodes_of
from compiler.errors import CompileError
from compiler.lower import Node
from compiler.tune import main
from compiler.tune_inputs import lengths, step_inputs
from compiler.tuned import Records, call_key, load_records, save_records
from conf.errors import ConfigError
from conf.load import load as load_config
from conf.schema import CompileConfig, TuneConfig
from runtime.artifact import Bucket

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def cuda_config() -> CompileConfig:
    config = toy_config(toy("llama"), dtype="bfloat16")
    config.target.kind, config.target.name, config.target.arch = "cuda", "h200", "sm_90a"
    return config


def nodes(records: Records = Records()) -> tuple[Node, ...]:
    base = draft(toy("llama"), cuda_config())
    return nodes_of(base.program, base.weights, base.buckets[0], "cuda", records)


def test_a_record_chooses_and_is_read_back(tmp_path: Path) -> None:
    node = next(n for n in nodes() if n.shape.op == "linear")
    other = node.kernel.candidates(node.shape)[1]  # type: ignore[union-attr]
    entry = {"kernel": node.kernel.name, "config": asdict(other), "us": 1.5}
    records = Records(gpu="h200", versions={"triton": "3"}, entries={call_key(node.shape): entry})
    path = save_records(records, tmp_path)
    assert load_records("h200", tmp_path) == records
    assert json.loads(path.read_text())["entries"][call_key(node.shape)]["us"] == 1.5
    chosen = next(n for n in nodes(load_records("h200", tmp_path)) if n.shape == node.shape)
    assert chosen.config == other and chosen.measured and not chosen.guessed
    assert node.guessed and not node.measured


def test_a_record_of_a_configuration_that_is_gone_is_no_choice() -> None:
    node = next(n for n in nodes() if n.shape.op == "linear")
    for entry in (
        {"kernel": node.kernel.name, "config": {"gone": 1}, "us": 1.0},
        {"kernel": "gone", "config": {}, "us": 1.0},
    ):
        same = nodes(Records(gpu="h200", entries={call_key(node.shape): entry}))
        assert next(n for n in same if n.shape == node.shape).config == node.config


def test_damaged_records_are_named(tmp_path: Path) -> None:
    assert load_records("h200", tmp_path).entries == {}
    for text in ("{", '{"schema": 99, "versions": {}, "entries": {}}', '{"schema": 1}'):
        (tmp_path / "h200.json").write_text(text)
        with pytest.raises(CompileError, match=r"h200\.json"):
            load_records("h200", tmp_path)


def test_the_key_of_a_call_leaves_out_where_a_layer_lies() -> None:
    attention = [n for n in nodes() if n.shape.op == "attention"]
    assert len(attention) > 1
    assert len({call_key(n.shape) for n in attention}) == 1


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_inputs_are_a_step(kind: str) -> None:
    base = draft(toy("llama"), cuda_config())
    bucket = Bucket(name="x", tokens=40, seqs=40 if kind == "decode" else 6, pages=4, kind=kind)
    new, keys = lengths(bucket, 24)
    inputs = step_inputs(base.program, bucket, 24, 16, pool=512)
    live = inputs["live"]
    assert live[0] == sum(new) <= bucket.tokens and live[1] == live[2] == len(new) <= bucket.seqs
    assert (new == [1] * 40 and set(keys) == {24}) if kind == "decode" else new == keys
    slots = inputs["kv_slots"][: live[0]]
    assert len(np.unique(slots)) == len(slots)
    starts = inputs["seq_start"][: live[1] + 1]
    assert starts[0] == 0 and starts[-1] == live[0]
    last = inputs["positions"][starts[1:] - 1]
    assert (last + 1 == inputs["seq_len"][: live[1]]).all()


@pytest.mark.slow
def test_the_program_on_the_stub(tmp_path: Path) -> None:
    """Every candidate is built, bound, launched and (by the stub's clock) timed; the records come
    out and the step is settled."""
    load()  # skips where there is a real driver
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(build().parent),
        "CUDA_STUB_cubins": "1",
        "CUDA_STUB_free": str(2 << 30),
    }
    words = ["model=tiny", "target=h200", "ops=[embed,rope_kv]", "rounds=2", "memory_gib=0.5"]
    shape = ["shape.max_seqs=1", "shape.max_tokens=16", "shape.context=64", "dtype=bfloat16"]
    done = subprocess.run(
        [sys.executable, "-m", "compiler.tune", *words, *shape, f"records={tmp_path}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = load_records("h200", tmp_path)
    assert {key.split()[0] for key in records.entries} == {"embed", "rope_kv"}
    assert {"triton", "ptxas", "gpu", "driver"} <= set(records.versions)
    assert "step d1:" in done.stderr and "step t16:" in done.stderr


def test_a_cpu_is_not_tuned() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "compiler.tune", "model=tiny", "target=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "only GPUs are tuned" in done.stderr


@pytest.mark.parametrize("word", ["out=x", "name=x", "accuracy.max_delta=0.1"])
def test_options_without_an_effect_are_refused(word: str) -> None:
    loaded = load_config(TuneConfig, "tune", ["model=tiny", "target=h200", word])
    with pytest.raises(ConfigError, match=f"{word.partition('=')[0]}: does nothing here"):
        main(loaded.config, loaded.sources)
