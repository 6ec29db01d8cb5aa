"""Quantized checkpoints against their publishers' arithmetic: DeepSeek's fp8 in blocks and
gpt-oss's MXFP4, each as a whole checkpoint that must equal the one it was made from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_models
from safetensors.torch import load_file, save_file

import compiler.families.register  # noqa: F401 - fills FAMILIES
from compiler.checkpoint import Checkpoint, ConfigReader
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.families.family import family_of
from compiler.families.names import logical_weights
from compiler.weights import checkpoint_weights

pytest.importorskip("transformers")
BLOCK = (16, 24)


def save(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Checkpoint:
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return Checkpoint.open(directory)


def fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and the numbers they stand for, one block at a time."""
    rows, columns = -(-w.shape[0] // BLOCK[0]), -(-w.shape[1] // BLOCK[1])
    codes, exact = torch.empty(w.shape, dtype=torch.float8_e4m3fn), torch.empty(w.shape)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            at = (
                slice(i * BLOCK[0], (i + 1) * BLOCK[0]),
                slice(j * BLOCK[1], (j + 1) * BLOCK[1]),
            )
            scales[i, j] = w[at].abs().max() / 448
            codes[at] = (w[at] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[at] = codes[at].float() * scales[i, j]
    return codes, scales, exact.bfloat16()


def test_scales_of_the_kv_cache_are_refused(tmp_path: Path) -> None:
    """Never ignored: with them keys and values mean something else."""
    toy_models.save(toy_models.RECIPES["llama"][0], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.k_scale"
    checkpoint = save(tmp_path, tensors | {name: torch.ones(1)})
    reader = ConfigReader(checkpoint.config, "config.json")
    family = family_of(reader)
    with pytest.raises(CompileError, match=f"{name} is a scale of the KV cache"):
        checkpoint_weights(family, family.read(reader), checkpoint)
    method = {"quant_method": "fp8", "weight_block_size": [8, 8], "kv_cache_scheme": {"bits": 8}}
    config = save(tmp_path, tensors, quantization_config=method).config
    with pytest.raises(CompileError, match=r"kv_cache_scheme .*kv=fp8_e4m3"):
        family.read(ConfigReader(config, "config.json"))


def test_fp8_in_blocks(tmp_path: Path) -> None:
    toy_models.save(toy_models.RECIPES["deepseek_v3"][0], tmp_path, old_config=True)
    plain, quantized = load_file(tmp_path / "model.safetensors"), dict[str, torch.Tensor]()
    expected = {}
    for name, tensor in plain.items():
        if name.endswith("proj.weight"):
            codes, scales, exact = fp8(tensor)
            quantized |= {name: codes, f"{name}_scale_inv": scales}
            expected[name] = exact
        else:
            quantized[name] = expected[name] = tensor
    method = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
    checkpoint = save(tmp_path, quantized, quantization_config=method)
    assert set(checkpoint.names()) == set(plain) and checkpoint.dtype() == "bfloat16"
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
    reader = ConfigReader(checkpoint.config, "config.json")
    family = family_of(reader)
    spec = family.read(reader)
    weights = checkpoint_weights(family, spec, checkpoint)
    for name, shape in logical_weights(spec).items():
        assert tuple(weights.fetch(name).shape) == shape

    name = "model.layers.0.mlp.up_proj.weight"
    wrong = quantized | {f"{name}_scale_inv": torch.ones(1, 1)}
    with pytest.raises(DamagedCheckpoint, match=r"up_proj.weight_scale_inv is \[1, 1\], expected"):
        save(tmp_path, wrong)
    del wrong[f"{name}_scale_inv"]
    with pytest.raises(CompileError, match="is F8_E4M3"):
        save(tmp_path, wrong).tensor(name)
    with pytest.raises(DamagedCheckpoint, match="weight_block_size is 128, expected two"):
        save(tmp_path, quantized, quantization_config=method | {"weight_block_size": 128})


def test_mxfp4_of_experts(tmp_path: Path) -> None:
    """Against the conversion of transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    toy_models.save(toy_models.RECIPES["gpt_oss"][0], tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    quantized, expected = dict(plain), dict(plain)
    g = torch.Generator().manual_seed(0)
    for name in plain:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, rows = quantized.pop(name).shape
            shape = (experts, rows, inputs // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=g).to(torch.uint8)
            scales = torch.randint(120, 130, shape, generator=g).to(torch.uint8)
            quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            expected[name] = convert_moe_packed_tensors(blocks, scales)
    checkpoint = save(tmp_path, quantized, quantization_config={"quant_method": "mxfp4"})
    assert set(checkpoint.names()) == set(plain)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
    reader = ConfigReader(checkpoint.config, "config.json")
    family = family_of(reader)
    checkpoint_weights(family, family.read(reader), checkpoint)

    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(DamagedCheckpoint, match=r"down_proj_scales \[5, 64\] are not"):
        save(tmp_path, quantized | {f"{name}_scales": quantized[f"{name}_scales"][..., 0]})
