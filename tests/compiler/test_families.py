"""Families against transformers at toy size: specs, every weight, rope frequencies, and logits of
a plain forward over the spec.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import toy_embedders
import toy_models
from published_moe import PUBLISHED_MOE
from toy_specs import SHAPES

import compiler.families.register  # noqa: F401 - fills FAMILIES
from compiler.checkpoint import Checkpoint, ConfigReader
from compiler.errors import CompileError, DamagedCheckpoint, ProgramError
from compiler.families.family import FAMILIES, family_of
from compiler.families.names import Source, bind, logical_weights
from compiler.families.spec import ModelSpec
from compiler.families.table import named_shapes, read_shape
from compiler.weights import Weights, checkpoint_weights

pytest.importorskip("transformers")
CASES = [
    pytest.param(recipe, id=f"{family}-{recipe.label}")
    for family, recipes in toy_models.RECIPES.items()
    for recipe in recipes
]


def read(directory: Path) -> tuple[ModelSpec, Weights]:
    checkpoint = Checkpoint.open(directory)
    reader = ConfigReader(checkpoint.config, "config.json")
    family = family_of(reader)
    spec = family.read(reader)
    return spec, checkpoint_weights(family, spec, checkpoint)


def test_every_family_has_recipes() -> None:
    encoders = {toy.family for toy in toy_embedders.EMBEDDERS}
    assert toy_models.RECIPES.keys() | encoders == FAMILIES.keys()


@pytest.mark.parametrize("recipe", CASES)
def test_spec_of_both_spellings(recipe: toy_models.Recipe, tmp_path: Path) -> None:
    """Every weight is found, and no other; the older config.json says the same as the newer one."""
    model = toy_models.save(recipe, tmp_path / "new").model
    spec, _ = read(tmp_path / "new")
    assert spec.parameters() == model.num_parameters() + recipe.more_parameters
    if recipe.export is None:
        toy_models.save(recipe, tmp_path / "old", old_config=True)
        assert read(tmp_path / "old")[0] == spec


@pytest.mark.parametrize("recipe", [c for c in CASES if c.id.startswith(("llama", "qwen", "phi3"))])
def test_rope_is_the_reference_s_bit_for_bit(recipe: toy_models.Recipe, tmp_path: Path) -> None:
    model = toy_models.save(recipe, tmp_path).model
    spec, _ = read(tmp_path)
    rope = spec.layers[0].mixer.rope
    assert rope is not None
    reference = model.model.rotary_emb
    assert rope.inv_freq == tuple(reference.inv_freq.tolist())
    assert rope.scale == pytest.approx(reference.attention_scaling, rel=1e-12)


def test_weights_are_those_of_the_file(tmp_path: Path) -> None:
    model = toy_models.save(toy_models.RECIPES["qwen3"][0], tmp_path, shards=True).model
    spec, weights = read(tmp_path)
    state = model.state_dict()
    assert torch.equal(weights.fetch("layers.1.down"), state["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(
        weights.fetch("layers.0.q_norm"), state["model.layers.0.self_attn.q_norm.weight"]
    )
    for name, shape in logical_weights(spec).items():
        assert tuple(weights.fetch(name).shape) == shape


# --- named shapes ---------------------------------------------------------------------------------

# Parameters in millions: what the publishers' weight files hold, or else what they call the size.
# Of a multimodal model, the language half.
PUBLISHED = {
    "baichuan-7b": 7000.6,
    "baichuan-13b": 13264.9,
    "baichuan2-7b": 7506.0,
    "baichuan2-13b": 13896.7,
    "chatglm2-6b": 6243.6,
    "chatglm3-6b": 6243.6,
    "command-r": 34980.8,
    "command-r-08-2024": 32296.5,
    "command-r-plus": 103810.7,
    "command-r7b": 8028.0,
    "deepseek-llm-7b": 6910.4,
    "deepseek-llm-67b": 67425.0,
    "exaone3-7.8b": 7818.4,
    "exaone3.5-2.4b": 2405.3,
    "exaone3.5-7.8b": 7818.4,
    "exaone3.5-32b": 32003.2,
    "gemma-2b": 2506.2,
    "gemma-7b": 8537.7,
    "gemma2-2b": 2614.3,
    "gemma2-9b": 9241.7,
    "gemma2-27b": 27227.1,
    "gemma3-1b": 999.9,
    "gemma3-4b": 3884.0,
    "gemma3-12b": 11771.0,
    "gemma3-27b": 27016.0,
    "glm4-9b": 9400.0,
    "glm4-9b-hf": 9400.0,
    "glm4-9b-0414": 9400.3,
    "glm4-32b-0414": 32566.1,
    "internlm2-1.8b": 1889.1,
    "internlm2-7b": 7737.7,
    "internlm2-20b": 19861.1,
    "internlm2.5-7b": 7737.7,
    "llama2-7b": 6738.4,
    "llama2-13b": 13015.9,
    "llama2-70b": 68976.6,
    "llama3-8b": 8030.3,
    "llama3-70b": 70553.7,
    "llama3.1-8b": 8030.3,
    "llama3.1-70b": 70553.7,
    "llama3.1-405b": 405853.4,
    "llama3.2-1b": 1235.8,
    "llama3.2-3b": 3212.7,
    "minicpm-1b": 1360.2,
    "minicpm-2b": 2724.9,
    "mistral-7b": 7248.0,
    "mistral-nemo-12b": 12247.8,
    "phi1": 1418.3,
    "phi1.5": 1418.3,
    "phi2": 2779.7,
    "phi3-mini": 3821.1,
    "phi3-medium": 13960.2,
    "phi4": 14659.5,
    "phi4-mini": 3836.0,
    "qwen-7b": 7721.3,
    "qwen-14b": 14167.3,
    "qwen-72b": 72287.9,
    "qwen2-0.5b": 494.0,
    "qwen2-1.5b": 1543.7,
    "qwen2-7b": 7615.6,
    "qwen2-72b": 72706.2,
    "qwen2.5-3b": 3085.9,
    "qwen2.5-14b": 14770.0,
    "qwen2.5-32b": 32763.9,
    "qwen3-0.6b": 596.0,
    "qwen3-1.7b": 1720.6,
    "qwen3-4b": 4022.5,
    "qwen3-8b": 8190.7,
    "qwen3-14b": 14768.3,
    "qwen3-32b": 32762.1,
    "smollm-135m": 134.5,
    "smollm-360m": 361.8,
    "smollm-1.7b": 1711.4,
    "smollm2-135m": 134.5,
    "smollm2-360m": 361.8,
    "smollm2-1.7b": 1711.4,
    "smollm3-3b": 3075.1,
    "stablelm-3b": 2795.4,
    "stablelm2-1.6b": 1644.5,
    "stablelm2-12b": 12143.2,
    "tinyllama-1.1b": 1100.0,
    "xverse-7b": 7300.0,
    "xverse-13b": 13718.0,
    "xverse-65b": 66408.0,
    "yi-6b": 6061.0,
    "yi-34b": 34388.9,
    **PUBLISHED_MOE,
}


def test_every_named_shape_is_published() -> None:
    known = PUBLISHED.keys() | toy_embedders.PUBLISHED.keys()
    assert set(named_shapes()) == known


@pytest.mark.parametrize(("name", "mla"), [s for s in SHAPES if s.values[0] in PUBLISHED])
def test_named_shapes(name: str, mla: str) -> None:
    _, spec = read_shape(name, mla)
    assert spec.parameters() / 1e6 == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_specs_survive_the_manifest(name: str) -> None:
    _, spec = read_shape(name)
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(spec)), ModelSpec) == spec


def test_gemma_scales_are_rounded_as_the_checkpoint_is_stored() -> None:
    scales = {n: read_shape(n)[1].embed_scale for n in ("gemma-7b", "gemma2-2b", "gemma3-4b")}
    assert scales == {"gemma-7b": 55.5, "gemma2-2b": 48.0, "gemma3-4b": 50.5}


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    toy_models.save(toy_models.RECIPES["llama"][0], directory, old_config=True)
    return directory


REFUSALS = [
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"residual_multiplier": 0.3}, "'residual_multiplier'"),
    ({"rope_scaling": {"type": "cubic", "factor": 2.0}}, "'cubic'.*yarn"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor has 1.*8"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "extra": 1}}, "'extra'"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"partial_rotary_factor": 0.2}, "3 of 16 dims.*partial_rotary_factor 0.2"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
    ({"num_key_value_heads": 3}, "4 heads.*3"),
    ({"hidden_size": 66, "head_dim": None}, "66.*4"),
    ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"hidden_size": None}, "'hidden_size' is missing"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ({"intermediate_size": 97}, r"mlp.gate_proj.weight \[96, 64\].*layers.0.gate \[97, 64\]"),
    ({"num_hidden_layers": 3}, r"tensor model.layers.2.\S+ is missing"),
    ({"num_hidden_layers": 1}, r"tensor model.layers.1.\S+ .* not used"),
    ({"attention_bias": True}, "q_proj.bias is missing"),
    ({"rope_theta": 0.0}, "rope_theta is 0.0, expected more than 0"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=lambda v: str(v)[:50])
def test_refused_by_name(plain: Path, change: dict[str, Any], message: str) -> None:
    checkpoint = Checkpoint.open(plain)
    reader = ConfigReader(checkpoint.config | change, "config.json")
    with pytest.raises((CompileError, DamagedCheckpoint), match=message) as caught:
        family = family_of(reader)
        checkpoint_weights(family, family.read(reader), checkpoint)
    assert "\n" not in str(caught.value)


FAMILY_REFUSALS = [  # a family's first recipe, and a value it has never heard of
    ("gemma", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported.*gelu"),
    ("gemma", {"attention_bias": True}, "attention_bias True"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
    ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0"),
    ("gemma3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
    ("gemma3_multimodal", {"text_config": {"hidden_size": 64}}, "'intermediate_size' is missing"),
    ("qwen", {"no_bias": False}, "no_bias False"),
    ("qwen", {"rotary_pct": 0.5}, "rotary_pct 0.5"),
    ("qwen", {"intermediate_size": 191}, "intermediate_size 191 is odd"),
    ("qwen", {"n_embd": 32}, "n_embd is 32 and hidden_size is 64; they name the same"),
    ("stablelm", {"rope_pct": 0.5, "partial_rotary_factor": 0.25}, "rope_pct is 0.5 and partial"),
    ("cohere", {"logit_scale": "big"}, "logit_scale is 'big', expected float"),
    ("cohere2", {"use_parallel_block": False}, "use_parallel_block False"),
    ("cohere2", {"position_embedding_type": "alibi"}, "position_embedding_type 'alibi'"),
    ("chatglm", {"interleaved_qkv": True}, "interleaved_qkv True"),
    ("chatglm", {"multi_query_attention": False}, "multi_query_attention False"),
    ("chatglm", {"rope_ratio": 0.0}, "rope_ratio is 0.0"),
    ("chatglm", {"num_hidden_layers": 3}, "num_layers is 2 and num_hidden_layers is 3"),
    ("glm", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("glm4", {"partial_rotary_factor": 0.01, "rope_parameters": None}, "0 of 32 dims"),
    ("internlm2", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope type 'ntk'"),
    ("internlm2", {"bias": True}, "attention.wqkv.bias is missing"),
    ("exaone", {"activation_function": "relu"}, "hidden_act 'relu'"),
    ("baichuan", {"hidden_size": 5120}, "5120 and max_position_embeddings present contradict"),
    ("minicpm", {"num_experts": 8}, "'num_experts'"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm True"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias True"),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers has 3 entries, expected 4"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 2]}, "expected 4 of 0 or 1"),
]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family that is asked for, made once."""
    base = tmp_path_factory.mktemp("toys")
    made = {}
    for family in dict.fromkeys(family for family, _, _ in FAMILY_REFUSALS):
        made[family] = base / family
        toy_models.save(toy_models.RECIPES[family][0], made[family])
    return made


@pytest.mark.parametrize(("family", "change", "message"), FAMILY_REFUSALS, ids=str)
def test_families_refuse_by_name(
    toys: dict[str, Path], family: str, change: dict[str, Any], message: str
) -> None:
    checkpoint = Checkpoint.open(toys[family])
    reader = ConfigReader(checkpoint.config | change, "config.json")
    with pytest.raises((CompileError, DamagedCheckpoint), match=message) as caught:
        checkpoint_weights(FAMILIES[family], FAMILIES[family].read(reader), checkpoint)
    assert "\n" not in str(caught.value)


def test_mistral_window_missing_null_or_zero(tmp_path: Path) -> None:
    toy_models.save(toy_models.RECIPES["mistral"][0], tmp_path, old_config=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for value, window in (("absent", 4096), (None, None), (0, None), (7, 7)):
        changed = {**config, "sliding_window": value}
        if value == "absent":
            del changed["sliding_window"]
        reader = ConfigReader(changed, "c")
        spec = family_of(reader).read(reader)
        assert {layer.mixer.window for layer in spec.layers} == {window}


def test_name_maps_can_split_reorder_and_join() -> None:
    """A packed tensor as some families store it: per kv head its query heads, key, value."""
    packed = torch.arange(8 * 3, dtype=torch.float32).view(8, 3)  # 2 groups x (2 q + k + v) x 1
    q = Source(tensor="w", view=(2, 4, 1, 3)).apply(packed)[:, :2].reshape(4, 3)
    rows = Source(tensor="w", rows=(0, 2)).apply(packed)
    assert torch.equal(q[:2], rows)
    transposed = Source(tensor="w", view=(8, 3), order=(1, 0)).apply(packed)
    assert torch.equal(transposed, packed.T)


class Shapes(dict[str, tuple[int, ...]]):
    def names(self) -> list[str]:
        return list(self)

    def shape(self, name: str) -> tuple[int, ...]:
        return self[name]


def test_bind_counts_every_element(plain: Path) -> None:
    spec, _ = read(plain)
    family = FAMILIES["llama"]
    names = dict(family.names(spec))
    shapes = Shapes({s[0].tensor: logical_weights(spec)[n] for n, s in names.items()})
    bind(spec, names, shapes, ())
    packed = dict(names)
    for start, part in ((0, "q"), (64, "k"), (96, "v")):
        del shapes[names[f"layers.0.{part}"][0].tensor]
        packed[f"layers.0.{part}"] = (
            Source(tensor="qkv", rows=(start, start + (64 if part == "q" else 32))),
        )
    shapes["qkv"] = (128, 64)
    bind(spec, packed, shapes, ())
    shapes["qkv"] = (129, 64)
    with pytest.raises(ProgramError, match="8192 of 8256 elements of qkv"):
        bind(spec, packed, shapes, ())
    with pytest.raises(ProgramError, match="embed"):
        bind(spec, {k: v for k, v in packed.items() if k != "embed"}, shapes, ())


def test_tied_head_may_be_stored_twice_and_inv_freq_is_ignored(plain: Path) -> None:
    spec, _ = read(plain)
    ignorable = FAMILIES["llama"].ignorable_tensors(spec)
    names = FAMILIES["llama"].names(spec)
    shapes = Shapes({s[0].tensor: logical_weights(spec)[n] for n, s in names.items()})
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (8,)
    bind(spec, names, shapes, ignorable)
    shapes["model.layers.0.self_attn.lora_A.weight"] = (8, 64)
    with pytest.raises(CompileError, match=r"lora_A.weight \[8, 64\] is not used"):
        bind(spec, names, shapes, ignorable)
