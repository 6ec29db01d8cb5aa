"""Comparing and reporting result files: ratios, exit codes, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import compare, report, results
from bench.errors import BenchError
from conf.bench_schema import CompareConfig, ReportConfig


def latency(batch: int, decode: float, prefill: float = 1.0) -> dict:
    return {
        "bench": "latency",
        "run_name": "default",
        "batch_size": batch,
        "input_len": 16,
        "output_len": 8,
        "threads": 2,
        "prefill_latency": prefill,
        "median_decode_latency": decode,
    }


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("after", "threshold", "code"),
    [(0.0104, 0.05, 0), (0.0106, 0.05, 1), (0.0106, 0.1, 0), (0.001, 0.0, 0)],
)
def test_exit_code(tmp_path: Path, after: float, threshold: float, code: int) -> None:
    a = write(tmp_path / "a.jsonl", [latency(1, 0.010), latency(8, 0.02)])
    b = write(tmp_path / "b.jsonl", [latency(1, after), latency(8, 0.02)])
    assert compare.main(CompareConfig(before=a, after=b, threshold=threshold), {}) == code


def test_repeated_settings_compare_by_median(capsys: pytest.CaptureFixture[str]) -> None:
    before = [latency(1, v) for v in (1.0, 2.0, 9.0)]
    lines, worse = compare.compare(before, [latency(1, 2.0)], CompareConfig(before="a", after="b"))
    assert worse == 0
    assert any("median_decode_latency" in line and "1.000" in line for line in lines)


def test_throughput_is_better_when_larger() -> None:
    def peers(rate: float) -> list[dict]:
        entry = {"precision": "fp32", "peer": "torch", "workload": "w", "tokens_per_second": rate}
        return [{"bench": "peers", "model": "m", "threads": 2, "results": [entry]}]

    config = CompareConfig(before="a", after="b")
    assert compare.compare(peers(100), peers(90), config)[1] == 1
    assert compare.compare(peers(100), peers(110), config)[1] == 0


def test_new_failures_are_a_regression() -> None:
    def serving(failed: int) -> list[dict]:
        metrics = dict.fromkeys(compare.METRICS["serving"], 1.0) | {"failed": failed}
        return [{"bench": "serving", "backend": "native", **metrics}]

    config = CompareConfig(before="a", after="b", threshold=10.0)
    assert compare.compare(serving(0), serving(1), config)[1] == 1


def test_nothing_in_common() -> None:
    with pytest.raises(BenchError, match="no setting in common"):
        config = CompareConfig(before="a", after="b")
        compare.compare([latency(1, 1.0)], [latency(2, 1.0)], config)


def test_unknown_metric() -> None:
    config = CompareConfig(before="a", after="b", metrics=["nonsense"])
    with pytest.raises(BenchError, match="nonsense"):
        compare.compare([latency(1, 1.0)], [latency(1, 1.0)], config)


@pytest.mark.parametrize(
    ("text", "said"), [("{bad\n", "not JSON"), ("[1]\n", "not a JSON object"), ("\n", "no results")]
)
def test_unreadable_results(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(BenchError, match=said):
        results.read(str(path))


def test_results_round_trip(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "x.jsonl")
    line = results.stamp("latency", latency(1, 2.0), artifact="digest")
    results.append(path, line)
    results.append(path, line)
    assert results.read(path) == [line, line]
    assert line["artifact"] == "digest"
    assert {"cpu", "cores", "memory_bytes"} <= set(line["machine"])
    assert line["versions"]["numpy"]


def test_report_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [latency(1, 0.5), latency(8, 0.25)])
    assert report.main(ReportConfig(files=[path]), {}) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert "median_decode_latency" in header and len(rows) == 2
    image = tmp_path / "out.png"
    config = ReportConfig(files=[path], plot=str(image), y="median_decode_latency")
    assert report.main(config, {}) == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BenchError, match="no 'nonsense'"):
        report.main(ReportConfig(files=[path], columns=["nonsense"]), {})
