"""`bench.gpu` without a GPU: its processes on the stub driver, its bookkeeping, the peer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_stub import environment, load

from bench.errors import BenchUsage
from bench.gpu import peers
from bench.gpu.__main__ import line, main, summary, target_name
from bench.gpu.nodes import kind
from bench.gpu.sections import SECTIONS
from bench.peers.shape import Shape
from bench.peers.torch_eager import Llama
from conf.bench_schema import GpuConfig

ROOT = Path(__file__).resolve().parents[2]


def on_stub(*words: str) -> subprocess.CompletedProcess[str]:
    """A program whose driver is the stub."""
    load()  # skips where there is a real driver
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_section_is_recorded_and_none_stops_another(tmp_path: Path) -> None:
    """On the stub the machine answers; what needs torch on a GPU or an artifact says why not."""
    path = tmp_path / "gpu.json"
    words = ("hardware=h200", "sections=[machine,restore,products]", "models=[tiny]")
    done = on_stub("bench.gpu", *words, f"output_file={path}", "artifacts.tiny=/nowhere")
    assert done.returncode == 1, done.stderr
    document = json.loads(path.read_text())
    status = {r["section"]: r for r in document["sections"]}
    assert status["machine"]["figures"]["gpu"] == "Stub"
    assert "sees no GPU" in status["products"]["error"]
    assert "/nowhere: expected a directory" in status["restore"]["error"]
    assert document["unmeasured"] == ["restore tiny", "products tiny"]
    assert "not measured: restore tiny, products tiny" in done.stdout


def test_without_a_driver_the_machine_section_says_what_to_do(tmp_path: Path) -> None:
    load()
    words = ("hardware=h200", "sections=[machine]", "models=[]", f"output_file={tmp_path / 'o'}")
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "install the NVIDIA driver" in done.stdout


def test_time_is_bounded_by_section_and_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    config = GpuConfig(hardware="h200", seconds=0.5, models=["tiny"], output_file=str(path))
    assert main(config, {}) == 1
    document = json.loads(path.read_text())
    assert len(document["sections"]) == len(SECTIONS)
    assert all(r["status"] == "skipped" for r in document["sections"])


def test_names() -> None:
    assert target_name(["NVIDIA H200", "NVIDIA H100 80GB HBM3"], 1) == "h100"
    with pytest.raises(BenchUsage, match="no target for Tesla"):
        target_name(["Tesla T4"], 0)
    with pytest.raises(BenchUsage, match="shows 0 GPUs; give hardware="):
        target_name([], 0)
    with pytest.raises(BenchUsage, match="sections: no 'speed'"):
        main(GpuConfig(sections=["speed"]), {})
    assert kind("linear 12.qkv") == "linear *.qkv"
    assert summary({"a": 1.23456, "b": {"c": 2}, "d": [1]}) == "a 1.235, b(c 2)"
    failed = {"section": "x", "model": "", "status": "failed", "error": "one\ntwo"}
    assert line(failed).endswith("two")


def test_the_compiled_peer_computes_what_the_eager_one_does() -> None:
    config = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 50,
        "max_position_embeddings": 64,
    }  # fmt: skip
    shape = Shape.of("toy", config)
    torch.manual_seed(1)
    static, eager = peers.StaticLlama(shape, 2, 16), Llama(shape)
    eager.load_state_dict(
        {
            k: v
            for k, v in static.state_dict().items()
            if k.split(".")[-1] not in ("keys", "values", "cos", "sin", "causal")
        }
    )
    tokens = torch.randint(50, (2, 9))
    kv = torch.zeros(2, 2, 2, 2, 16, 16)
    with torch.inference_mode():
        for part, start in ((tokens[:, :8], 0), (tokens[:, 8:], 8)):
            at = torch.arange(start, start + part.shape[1])
            torch.testing.assert_close(static(part, at), eager(part, kv, start))
    assert len(peers.static_llama(shape, 2, 8, device="cpu", compile=False)) == peers.STEPS
