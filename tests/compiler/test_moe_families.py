"""What checkpoints of mixtures and of latent attention are refused for, by name; and the layers of
DeepSeek-V3 that predict further tokens, which are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_models
from safetensors.torch import load_file, save_file

import compiler.families.register  # noqa: F401 - fills FAMILIES
from compiler.checkpoint import Checkpoint, ConfigReader
from compiler.design import design
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.families.family import family_of
from compiler.families.spec import ModelSpec, MoeFfn
from compiler.importer import import_model
from compiler.inspect import show
from compiler.pipeline import compile_model
from compiler.progress import Progress
from compiler.weights import Weights, checkpoint_weights
from conf.load import load
from conf.schema import CompileConfig
from runtime.artifact import Artifact

pytest.importorskip("transformers")


def read(directory: Path, **change: Any) -> tuple[ModelSpec, Weights]:
    checkpoint = Checkpoint.open(directory)
    reader = ConfigReader(checkpoint.config | change, "config.json")
    family = family_of(reader)
    spec = family.read(reader)
    return spec, checkpoint_weights(family, spec, checkpoint)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a family's first recipe, saved once."""
    done: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in done:
            done[family] = tmp_path_factory.mktemp(family)
            toy_models.save(toy_models.RECIPES[family][0], done[family], old_config=True)
        return done[family]

    return directory


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"num_experts_per_tok": 5}, "a token chooses 5 of 4 experts"),
    ("mixtral", {"num_local_experts": 5}, r"gate.weight \[4, 64\].*layers.0.router \[5, 64\]"),
    ("mixtral", {"num_hidden_layers": 1}, r"layers.1\S+ .* is not used"),
    ("mixtral", {"intermediate_size": 64}, r"w1.weight \[96, 64\].*experts_gate_up \[4, 128, 64\]"),
    ("mixtral", {"num_experts": 9}, "num_local_experts is 4 and num_experts is 9"),
    ("mixtral", {"router_temperature": 2.0}, "'router_temperature'"),
    ("qwen2_moe", {"qkv_bias": False}, r"proj.bias .* is not used"),
    ("qwen2_moe", {"mlp_only_layers": [0]}, r"layers.0.mlp.gate_proj.weight is missing"),
    ("qwen3_moe", {"moe_intermediate_size": 48}, r"layers.0.experts_gate_up \[6, 96, 64\]"),
    ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'.*'softmax'"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    ("deepseek_v2", {"num_key_value_heads": 2}, "2 kv heads for 4 heads"),
    ("deepseek_v2", {"head_dim": 48}, "head_dim 48"),
    ("deepseek_v2", {"q_lora_rank": 24}, "q_a_proj.weight is missing"),
    ("deepseek_v2", {"n_shared_experts": None}, "shared_experts.*is not used"),
    ("deepseek_v3", {"n_group": 3}, "8 experts cannot be 3 groups of which 2 are kept"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    ("minicpm3", {"qk_head_dim": 32}, "qk_head_dim 32"),
    ("olmoe", {"clip_qkv": "much"}, "clip_qkv is 'much'"),
    (
        "dbrx",
        {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
        "attn_config.rope_theta is 10000.0 and",
    ),
    (
        "dbrx",
        {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "bias": True}},
        "'bias'",
    ),
    ("grok", {"router_logit_softcapping": 30.0}, "router_logit_softcapping 30.0"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
    ("gpt_oss", {"intermediate_size": 32}, r"gate_up_proj \[5, 64, 192\].*experts_gate_up"),
]


@pytest.mark.parametrize(("family", "change", "message"), REFUSALS, ids=lambda v: str(v)[:40])
def test_refused_by_name(
    saved: Callable[[str], Path], family: str, change: dict[str, Any], message: str
) -> None:
    directory = saved(family)
    with pytest.raises((CompileError, DamagedCheckpoint), match=message) as caught:
        read(directory, **change)
    assert "\n" not in str(caught.value)


def test_a_missing_expert_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = load_file(saved("mixtral") / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved("mixtral") / "config.json").read_text())
    with pytest.raises(DamagedCheckpoint, match=r"experts.2.w2.weight is missing.*experts_down"):
        read(tmp_path)


def test_an_expert_of_another_shape_is_refused(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """As many numbers, the wrong way round."""
    tensors = load_file(saved("mixtral") / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved("mixtral") / "config.json").read_text())
    with pytest.raises(DamagedCheckpoint, match=r"w3.weight \[64, 96\].*cannot be layers.0.exp"):
        read(tmp_path)


def test_layers_that_predict_further_tokens_are_left_out(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = load_file(saved("deepseek_v3") / "model.safetensors")
    (tmp_path / "config.json").write_text((saved("deepseek_v3") / "config.json").read_text())
    spec, _ = read(saved("deepseek_v3"))
    extra = f"model.layers.{len(spec.layers)}"
    save_file(
        tensors
        | {f"{extra}.eh_proj.weight": torch.ones(2), f"{extra}.enorm.weight": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    assert read(tmp_path)[0] == spec
    save_file(
        tensors | {"model.layers.9.eh_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CompileError, match=r"layers.9.eh_proj.weight"):
        read(tmp_path)


def test_dense_and_sparse_layers_are_where_the_file_says(saved: Callable[[str], Path]) -> None:
    config = json.loads((saved("qwen3_moe") / "config.json").read_text())

    def sparse(**change: Any) -> list[int]:
        reader = ConfigReader(config | {"num_hidden_layers": 6} | change, "c")
        spec = family_of(reader).read(reader)
        return [i for i, layer in enumerate(spec.layers) if isinstance(layer.ffn, MoeFfn)]

    assert sparse() == [0, 1, 2, 3, 4, 5]
    assert sparse(decoder_sparse_step=2) == [1, 3, 5]
    assert sparse(decoder_sparse_step=2, mlp_only_layers=[3]) == [1, 5]


SMALL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "eos_token_id": 2,
}
MADE_SMALL: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 64,
        "n_routed_experts": 16,
        "q_lora_rank": 64,
        "first_k_dense_replace": 1,
    },
    "gpt-oss-20b": {
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "pad_token_id": 0,
        "layer_types": "[sliding_attention,full_attention]",
    },
}


@pytest.mark.parametrize(
    ("name", "mla"), [*((name, "auto") for name in MADE_SMALL), ("deepseek-v3", "plain")]
)
@pytest.mark.parametrize(
    ("dtype", "quant"), [("bfloat16", "none"), ("bfloat16", "int8"), ("float32", "int4")]
)
def test_stacks_of_matrices_are_quantized_and_run(
    name: str, mla: str, dtype: str, quant: str, tmp_path: Path
) -> None:
    """A published shape made small: the finished artifact is compared with the reference that has
    the same stored numbers, on the device."""
    keys = SMALL | MADE_SMALL[name]
    overrides = [f"model={name}", "weights=random", f"dtype={dtype}", f"quant={quant}"]
    overrides += [f"model.mla={mla}"]
    overrides += [f"model.config.{key}={value}" for key, value in keys.items()]
    shape = ["shape.context=128", "shape.max_tokens=32", "shape.max_seqs=4", f"out={tmp_path}"]
    loaded = load(CompileConfig, "compile", overrides + shape)
    artifact = Artifact.open(compile_model(loaded.config, loaded.sources, Progress()))
    assert 0 < artifact.manifest.accuracy["logit_error"] < 0.6
    assert ("plain MLA" in "\n".join(show(artifact))) == (mla == "plain")


@pytest.mark.parametrize(("name", "active"), [("deepseek-v3", 37e9), ("mixtral-8x7b", 12.9e9)])
def test_a_token_reads_the_parameters_its_publisher_calls_active(name: str, active: float) -> None:
    """The static cost of a step, without reading or making a weight."""
    overrides = [f"model={name}", "weights=random", "dtype=bfloat16", "kv=bf16", "target=cpu"]
    shape = ["shape.context=64", "shape.max_tokens=8", "shape.max_seqs=1"]
    config = load(CompileConfig, "compile", overrides + shape).config
    made = design(import_model(config).spec, config)
    assert made.costs["t1"]["read"] / 2 == pytest.approx(active, rel=0.03)
