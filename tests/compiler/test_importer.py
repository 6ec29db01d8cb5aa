"""The import stage as a whole: what a configuration brings in, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import toy_models

from compiler import report
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.families.names import logical_weights
from compiler.hub import locate
from compiler.importer import Imported, import_model
from compiler.pipeline import compile_model
from compiler.progress import Progress
from compiler.weights import by_module
from conf.load import group_values, load
from conf.options import group_choices
from conf.schema import CompileConfig, ModelConfig
from runtime.errors import UsageError

TINY = locate("package:tiny", None)
NAMED = sorted(set(group_choices("model")) - {"hf", "tiny"})


def imported(*overrides: str) -> Imported:
    return import_model(load(CompileConfig, "compile", overrides).config)


def test_tiny_is_a_real_checkpoint() -> None:
    model = imported("model=tiny")
    assert (model.name, model.spec.family, model.dtype) == ("tiny", "llama", "bfloat16")
    assert model.text.eos_token_ids == (0, 2)
    assert {"tokenizer.json", "chat_template.jinja"} <= model.text.files.keys()
    assert {"config.json", "model.safetensors", "text/tokenizer.json"} <= model.digests.keys()
    for name, shape in logical_weights(model.spec).items():
        weight = model.weights.fetch(name)
        assert tuple(weight.shape) == shape and weight.dtype == torch.bfloat16
    assert (TINY / "model.safetensors").stat().st_size < 2.5e6


def test_tiny_has_learnt_something() -> None:
    """A trained embedding is far from the isotropic cloud it started as."""
    table = imported("model=tiny").weights.fetch("embed").float()
    spectrum = torch.linalg.svdvals(table - table.mean(0))
    assert spectrum[0] / spectrum.median() > 3


@pytest.mark.parametrize("name", NAMED)
def test_named_shapes_import_without_a_checkpoint(name: str) -> None:
    config = CompileConfig(model=ModelConfig(**group_values("model", name)), weights="random")
    model = import_model(config)
    eos = config.model.config.get("eos_token_id", model.spec.vocab - 1)  # encoders have none
    ends = eos if isinstance(eos, list) else [eos]
    assert list(model.text.eos_token_ids) == ends and max(ends) < model.spec.vocab
    assert model.name == name and model.dtype in ("bfloat16", "float16", "float32")
    norm = model.weights.fetch("layers.0.attn_norm")
    assert tuple(norm.shape) == (model.spec.dim,)
    assert "tokenizer.json" in model.text.files


def test_tensors_left_out_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_models.save(toy_models.RECIPES["gemma3_multimodal"][0], tmp_path / "toy")
    overrides = ["model=hf", f"model.source={tmp_path}/toy"]
    model = imported(*overrides)
    assert model.dropped == {"multi_modal_projector.*": 1, "vision_tower.*": 1}
    assert report.dropped(model.spec.family, model.dropped) == (
        "drop  2 tensors that family gemma3_multimodal does not use: "
        "multi_modal_projector.* (1), vision_tower.* (1)"
    )
    loaded = load(CompileConfig, "compile", [*overrides, "shape.max_tokens=1", "out=/dev/null/x"])
    with pytest.raises(UsageError):  # nowhere to write to: import and design alone
        compile_model(loaded.config, loaded.sources, Progress())
    assert "drop  2 tensors that family gemma3_multimodal" in capsys.readouterr().err
    assert imported("model=tiny").dropped == {}


def test_modules_of_tensors_left_out() -> None:
    """The largest module that is left out whole; buffers of used layers are counted together."""
    used = ["model.embed.weight", "model.layers.0.attn.q.weight", "model.layers.1.attn.q.weight"]
    left = ["model.layers.0.attn.rope.inv_freq", "model.layers.1.attn.rope.inv_freq"]
    left += ["model.layers.2.attn.q.weight", "model.layers.2.norm.weight", "lm_head.weight"]
    assert by_module(left, used) == {
        "lm_head.*": 1,
        "model.layers.*.attn.rope.*": 2,
        "model.layers.2.*": 2,
    }
    assert by_module(["pooler.dense.0.bias", "model.embed.ids"], used) == {
        "model.embed.ids": 1,
        "pooler.*": 1,
    }


def test_named_shapes_can_be_cut_down() -> None:
    small = imported("model=llama3-8b", "weights=random", "model.config.num_hidden_layers=2")
    assert len(small.spec.layers) == 2


def test_digests_tell_seeds_and_shapes_apart() -> None:
    def digests(*more: str) -> dict[str, str]:
        return imported("model=smollm-135m", "weights=random", *more).digests

    assert digests() == digests()
    assert digests()["random"] != digests("seed=1")["random"]
    other = digests("model.config.num_hidden_layers=2")
    assert digests()["config.json"] != other["config.json"]


def test_any_directory(tmp_path: Path) -> None:
    toy_models.save(toy_models.RECIPES["qwen3"][0], tmp_path / "My-Toy", shards=True)
    model = imported("model=hf", f"model.source={tmp_path / 'My-Toy'}")
    assert (model.name, model.spec.family, model.dtype) == ("my-toy", "qwen3", "float32")
    assert set(model.text.files) == {"generation_config.json"}
    assert sum("safetensors" in name for name in model.digests) > 1
    random = imported("model=hf", f"model.source={tmp_path / 'My-Toy'}", "weights=random")
    assert random.spec == model.spec
    assert not torch.equal(random.weights.fetch("layers.0.q"), model.weights.fetch("layers.0.q"))


def test_a_named_shape_refuses_another_model() -> None:
    with pytest.raises(CompileError, match=r"model=smollm-135m .* dim: 576 and 128.*model=hf"):
        imported("model=smollm-135m", "model.source=package:tiny")
    with pytest.raises(CompileError, match="layers"):
        imported("model=tiny", "model.config.rope_theta=5.0")
    assert imported("model=tiny", "model.config.rope_theta=10000.0").name == "tiny"


def test_a_source_that_is_not_there() -> None:
    with pytest.raises(CompileError, match="neither a directory nor a hub id"):
        imported("model=hf", "model.source=/no/such/model")


def test_damaged_weights_are_found_before_anything_is_compiled(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"copy/model.safetensors: tensors end at byte"):
        imported("model=hf", f"model.source={copy}")
