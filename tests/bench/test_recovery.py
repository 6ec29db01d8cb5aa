"""The bench of kills, on the null device: every figure is there, and wrong clients are an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_artifact import write_artifact

from bench.errors import BenchError
from bench.recovery import main
from conf.bench_schema import RecoveryConfig


def config(path: Path, **options: object) -> RecoveryConfig:
    artifact = str(write_artifact(path))
    serve = ["device='null'", "null_step_s=0.02"]
    return RecoveryConfig(artifact=artifact, serve=serve, repeat=1, timeout=20, **options)  # type: ignore[arg-type]


def test_every_event_has_its_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.jsonl"
    assert main(config(tmp_path, clients=5, tokens=900, output_file=str(out)), {}) == 0
    (line,) = [json.loads(text) for text in out.read_text().splitlines()]
    events = ["last client told", "ready again", "token again", "nothing left"]
    assert list(line["median_seconds"]) == events
    seconds = line["runs"][0]
    assert 0 < seconds["last client told"] < seconds["token again"] < 20
    assert line["clients"] == 5 and line["machine"] and line["versions"] and line["artifact"]
    printed = capsys.readouterr().out
    assert all(event in printed for event in events)


def test_clients_that_are_refused_are_not_taken_for_interrupted(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"client . got 0 errors, not one: .*maximum context"):
        main(config(tmp_path, clients=2, tokens=5000), {})
