"""Matrices of bfloat16 numbers in float32 programs: stored in half the bytes by what they hold, not
by what a config says, and every result keeps its bits.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_embedding
import torch
import toy_embedders
import toy_models
from safetensors.torch import load_file, save_file
from test_end_to_end import PROMPTS, Subject, compiled, run
from toy_specs import FAMILIES, toy, toy_config

from compiler.checkpoint import SINGLE, Checkpoint
from compiler.design import design
from compiler.families.names import logical_weights
from compiler.importer import import_model
from compiler.inspect import inputs, show, verify
from compiler.weights import CHUNK, CheckpointWeights, RandomWeights, all_bfloat16
from conf.load import load
from conf.schema import CompileConfig
from kernels.cpu.layout import WIDENED

RECIPES = {
    f"{family}-{form.label}": form
    for family in ("llama", "qwen2_moe", "deepseek_v2")
    for recipe in toy_models.RECIPES[family][:2]
    for form in recipe.forms()
}


def round_all(model: Any) -> None:
    for p in model.parameters():
        p.copy_(p.bfloat16())


def logprobs(subject: Subject) -> list[list[float | None]]:
    events = run(subject.artifact, PROMPTS, score=True)
    return [event.prompt_logprobs + event.logprobs for event in events]


def matrices(spec: Any) -> set[str]:
    return {name for name, shape in logical_weights(spec).items() if len(shape) > 1}


def import_from(directory: Path) -> Any:
    options = ["model=hf", f"model.source={directory}", "dtype=float32", "target=cpu"]
    return import_model(load(CompileConfig, "compile", options).config)


@pytest.mark.parametrize("name", RECIPES)
def test_bits_of_float32_storage_and_values_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    recipe = replace(RECIPES[name], change=round_all)
    narrow = compiled(recipe, tmp_path / "narrow")
    manifest = narrow.artifact.manifest
    assert set(manifest.widened) == matrices(inputs(manifest)[0])
    assert list(verify(narrow.artifact))  # its plans are derived again from the manifest
    assert f"{len(manifest.widened)} matrices hold" in "\n".join(show(narrow.artifact))

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWeights, "in_bfloat16", lambda self, name: False)
        whole = compiled(recipe, tmp_path / "whole")
    assert not whole.artifact.manifest.widened
    assert manifest.weights_bytes < 0.75 * whole.artifact.manifest.weights_bytes
    found = logprobs(narrow)
    assert found == logprobs(whole)
    for prompt, heard in zip(PROMPTS, found, strict=True):
        table = narrow.reference.logprobs(prompt)
        expected = [float(table[i - 1, t]) for i, t in enumerate(prompt) if i > 0]
        assert heard[1 : len(prompt)] == pytest.approx(expected, abs=1e-4)


def test_vectors_of_an_encoder_keep_their_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table of positions is stored as bfloat16, that of token types is not."""
    bert = next(one for one in toy_embedders.EMBEDDERS if one.family == "bert")
    toy_embedders.save(bert, tmp_path / "bert")
    tensors = load_file(tmp_path / "bert" / SINGLE)
    types = next(name for name in tensors if "token_type" in name)
    rounded = {n: t if n == types else t.bfloat16().float() for n, t in tensors.items()}
    save_file(rounded, tmp_path / "bert" / SINGLE)
    options = (tmp_path / "bert", tmp_path / "out", "shape.context=64", "shape.max_tokens=64")
    narrow = test_embedding.compiled(*options)
    assert "position_table" in narrow.manifest.widened
    assert "token_types" not in narrow.manifest.widened
    monkeypatch.setattr(CheckpointWeights, "in_bfloat16", lambda self, name: False)
    whole = test_embedding.compiled(*options)
    pairs = [test_embedding.embed(one, test_embedding.PROMPTS) for one in (narrow, whole)]
    assert [e.embedding for e in pairs[0]] == [e.embedding for e in pairs[1]]


def edited(source: Path, directory: Path, change: Any) -> Path:
    """The checkpoint with other tensors."""
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {n: t.float() for n, t in load_file(source / SINGLE).items()}
    save_file(change(tensors), directory / SINGLE)
    return directory


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 file of bfloat16 numbers."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("rounded")
    toy_models.save(replace(toy_models.RECIPES["llama"][0], change=round_all), path)
    return path


def widened(directory: Path) -> set[str]:
    model = import_from(directory)
    return set(design(model.spec, toy_config(model.spec), model.weights.in_bfloat16).widened)


def test_one_number_more_keeps_a_tensor_and_what_it_is_merged_with(
    rounded: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][95, 63] = 1 + 2**-8
        tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = 1 + 2**-23
        return tensors

    everything = matrices(import_from(rounded).spec)
    assert widened(rounded) == everything
    kept = {"layers.1.gate", "layers.1.up", "layers.0.o"}
    assert widened(edited(rounded, tmp_path / "one", change)) == everything - kept


def test_float16_checkpoints_stay_float32_but_where_their_numbers_are_bfloat16(
    rounded: Path, tmp_path: Path
) -> None:
    def halves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = {n: (t + torch.rand_like(t) / 100).half() for n, t in tensors.items()}
        exact = "model.layers.0.mlp.down_proj.weight"
        return own | {exact: tensors[exact].clamp(2**-14, 1).half()}

    assert widened(edited(rounded, tmp_path / "half", halves)) == {"layers.0.down"}


def test_bfloat16_files_are_believed_unread(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t.bfloat16() for n, t in tensors.items()}

    everything = matrices(import_from(rounded).spec)
    path = edited(rounded, tmp_path / "narrow", narrow)
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    assert widened(path) == everything
    with pytest.raises(pytest.fail.Exception):
        widened(rounded)


def test_the_config_decides_nothing(rounded: Path, tmp_path: Path) -> None:
    """A float32 file whose config says bfloat16."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t + torch.rand_like(t) for n, t in tensors.items()}

    path = edited(rounded, tmp_path / "tuned", change)
    config = json.loads((path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))
    assert widened(path) == set()


@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 3 * CHUNK - 1])
def test_every_number_is_looked_at(place: int) -> None:
    x = torch.randn(3 * CHUNK // 64, 64).bfloat16().float()
    assert all_bfloat16(x) and all_bfloat16(x.T) and all_bfloat16(x.bfloat16())
    x.view(-1)[place] = torch.tensor(0x3F800001, dtype=torch.int32).view(torch.float32)
    assert not all_bfloat16(x) and not all_bfloat16(x.T)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_lowered_with_any_of_its_weights_widened(family: str) -> None:
    spec = toy(family)
    for share in (1, 2, 3):
        names = list(logical_weights(spec))
        chosen = set(names[::share])
        made = design(spec, toy_config(spec), chosen.__contains__)
        for weight in made.weights:
            wanted = len(weight.arrays[0].shape) > 1 and chosen.issuperset(weight.parts)
            assert (weight.format == WIDENED) == wanted, weight.name
    assert not design(spec, toy_config(spec)).widened


def test_of_other_dtypes_only_what_would_be_float32_is_widened() -> None:
    spec = toy("moe")
    made = design(spec, toy_config(spec, dtype="bfloat16"), lambda name: True)
    assert made.widened and all(name.endswith("router") for name in made.widened)
    made = design(spec, toy_config(spec, "int8"), lambda name: True)
    assert all(name.endswith("router") for name in made.widened)
    config = toy_config(spec, "int8")
    config.quant.head = False
    assert "embed" in design(spec, config, lambda name: True).widened


@pytest.mark.parametrize(
    ("options", "dtype", "megabytes"),
    [
        ((), torch.bfloat16, 269),
        (("model.config.torch_dtype=float32",), torch.float32, 538),
        (("model.config.torch_dtype=float16",), torch.float16, 538),
    ],
)
def test_random_weights_are_as_the_shape_is_published(
    options: tuple[str, ...], dtype: torch.dtype, megabytes: int
) -> None:
    given = ["model=smollm2-135m", "weights=random", "dtype=float32", "target=cpu"]
    model = import_model(load(CompileConfig, "compile", [*given, *options]).config)
    assert isinstance(model.weights, RandomWeights)
    values = model.weights.fetch("layers.3.k")
    assert values.dtype == dtype
    assert all_bfloat16(values) == model.weights.in_bfloat16("layers.3.k") == (megabytes == 269)
    config = toy_config(model.spec)
    config.shape.context = 64
    made = design(model.spec, config, model.weights.in_bfloat16)
    assert made.weights_bytes / 1e6 == pytest.approx(megabytes, rel=0.003)
