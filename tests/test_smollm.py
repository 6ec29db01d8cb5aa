"""The 135M shape end to end: too large for every run, so marked slow.

Numbers against transformers at full size, static counts of a step, and the benchmarks as a user
types them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conf.load import load
from conf.schema import CompileConfig
from runtime import Engine

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
PROMPT = [(7919 * i + 13) % 49152 for i in range(96)]
LAYERS = 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """SmolLM-135M as transformers initialises and saves it."""
    transformers = pytest.importorskip("transformers")
    published = load(CompileConfig, "compile", ["model=smollm-135m"]).config.model.config
    config = transformers.LlamaConfig(**{**published, "torch_dtype": "float32"})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    path = tmp_path_factory.mktemp("smollm")
    model.save_pretrained(path)
    return path, model


def test_logprobs_and_greedy_tokens_of_transformers(
    checkpoint: tuple[Path, object], compile_artifact: Callable[..., Path]
) -> None:
    source, model = checkpoint
    artifact = compile_artifact(
        "model=hf", f"model.source={source}", "name=smollm", "dtype=float32", "shape=small"
    )
    with Engine(artifact=str(artifact)) as engine:
        answer = engine.generate(
            input_ids=PROMPT,
            sampling_params={"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0,
        )
    tokens = PROMPT + answer["output_ids"]
    with torch.inference_mode():
        table = model(torch.tensor([tokens])).logits[0].log_softmax(-1)  # type: ignore[operator]
    meta = answer["meta_info"]
    found = [p for p, *_ in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]]
    expected = [float(table[i, t]) for i, t in enumerate(tokens[1:])]
    assert found == pytest.approx(expected, abs=1e-3)
    assert answer["output_ids"] == table[len(PROMPT) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("options", "weight_mb"),
    [
        (("dtype=float32", "model.config.torch_dtype=float32"), 538.1),
        (("dtype=float32",), 269.1),
        (("quant=int8",), 143.0),
        (("quant=int4",), 75.7),
    ],
    ids=("fp32", "fp32 of bf16 numbers", "int8", "int4"),
)
def test_static_counts_and_benchmarks(
    compile_artifact: Callable[..., Path],
    tmp_path: Path,
    options: tuple[str, ...],
    weight_mb: float,
) -> None:
    artifact = compile_artifact("model=smollm-135m", "weights=random", *options)
    manifest = json.loads((artifact / "manifest.json").read_text())
    steps = manifest["report"]["steps"]
    assert {step["launches"] for step in steps.values()} == {5 * LAYERS + 5}
    assert manifest["weights_bytes"] / 1e6 == pytest.approx(weight_mb, rel=0.01)

    results = tmp_path / "results.jsonl"
    run("bench.latency", f"artifact={artifact}", "batch=[1,4]", "input_len=64", "output_len=16",
        f"output_file={results}")  # fmt: skip
    run("bench.startup", f"artifact={artifact}", f"output_file={results}")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(lines) == 3
    assert all(line["artifact"] == artifact.name.rpartition("-")[2] for line in lines)


def run(module: str, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
