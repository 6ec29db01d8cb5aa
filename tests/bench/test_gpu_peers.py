"""What `bench.gpu` compares with: models and products of torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from bench.gpu import calls, peers
from bench.peers.shape import Shape
from conf.bench_schema import GpuConfig
from kernels.ops.linear import e4m3_rows, linear_reference
from kernels.ops.samples import live
from runtime import Engine


def test_torchs_product_of_codes_is_the_ops() -> None:
    """The very codes, scales and sums, to bfloat16."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 64, generator=g) * torch.logspace(-3, 2, 5)[:, None]
    w = torch.randn(48, 64, generator=g)
    codes, scale = e4m3_rows(w)
    args = {"live": live(5), "x": x, "w": codes.float() * scale[:, None]}
    want = linear_reference(args, {"scale": 1.0, "softcap": 0.0, "x_format": "fp8"})["out"]
    got = calls.scaled_mm(*e4m3_rows(x), codes, scale).float()
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-4)


def test_a_product_is_beside_torchs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls.product_seconds(3, 32, 48, "cpu", codes=True) > 0
    assert calls.scaled_mm_refuses(32, 48, "cpu") is None
    assert "40 inputs and 48 outputs" in str(calls.scaled_mm_refuses(40, 48, "cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "capability 8.0" in str(calls.scaled_mm_refuses(32, 48, "cuda"))
    monkeypatch.delattr(torch, "_scaled_mm")
    assert "has no _scaled_mm" in str(calls.scaled_mm_refuses(32, 48, "cpu"))


def test_products_are_joined_by_peer_and_rows() -> None:
    rows: list[dict[str, Any]] = [
        {"rows": 8, "over_cublas": 2.0, "over_scaled_mm": 1.0},
        {"rows": 64, "over_cublas": 0.5, "over_scaled_mm": 4.0},
        {"rows": 128, "over_cublas": 9.0},
        {"rows": 512, "over_cublas": 0.9, "no_scaled_mm": "why"},
    ]
    assert calls.over_peers(rows) == pytest.approx(
        {"few_rows_over_cublas": 1, "few_rows_over_scaled_mm": 2, "many_rows_over_cublas": 0.9}
    )


TOY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 80, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip


def toy_checkpoint(folder: Path, shape: Shape) -> Path:
    """A checkpoint of the toy with large weights, so that greedy tokens differ from one another."""
    folder.mkdir()
    weights = {name: array * (1 if array.ndim == 1 else 12) for name, array in toy_weights(shape)}
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TOY))
    return folder


def toy_weights(shape: Shape) -> list[tuple[str, np.ndarray]]:
    return list(shape.random_weights(3))


def test_the_peer_decodes_the_tokens_that_we_do(
    tmp_path: Path, compile_artifact: Callable[..., Path]
) -> None:
    """The same weights in float32, greedy: prefill and many steps."""
    shape = Shape.of("toy", TOY)
    source = toy_checkpoint(tmp_path / "toy", shape)
    artifact = compile_artifact("model=hf", f"model.source={source}", "dtype=float32")
    prompts = np.random.default_rng(0).integers(0, 80, (3, 9)).tolist()
    with Engine(str(artifact)) as engine:
        parameters = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
        ours = [
            result["output_ids"]
            for result in engine.generate(input_ids=prompts, sampling_params=parameters)
        ]
    model = peers.build(shape, 3, 64, device="cpu", dtype=torch.float32)
    model.load((name, array * (1 if array.ndim == 1 else 12)) for name, array in toy_weights(shape))
    tokens, seconds = peers.greedy(model, torch.tensor(prompts), 40, compile=False)
    assert tokens.tolist() == ours and len(seconds) == 39
    assert len({token for sequence in ours for token in sequence}) > 10


@pytest.mark.slow
def test_the_peers_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile and transformers' static cache, as on a GPU, on the CPU."""
    monkeypatch.setattr(Shape, "load", lambda name: Shape.of("toy", TOY))
    config = GpuConfig(torch_device="cpu", batch=[1], context=16)
    (*_, figures) = peers.peers(config, "toy")
    assert {"compiled_batch_1_ms", "transformers_batch_1_ms"} <= figures.keys(), figures
