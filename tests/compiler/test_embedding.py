"""Embedding models from checkpoint to vector: against transformers' hidden states and the pooling
formulas, through the compiled plan and the scheduler; what the files say and what is refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_embedders
from safetensors.torch import load_file, save_file
from toy_embedders import EMBEDDERS, Embedder

from compiler.errors import CompileError
from compiler.families.names import logical_weights
from compiler.families.spec import Attention, PoolSpec
from compiler.importer import Imported, import_model
from compiler.inspect import verify
from compiler.pipeline import compile_model
from compiler.progress import Progress
from conf.errors import ConfigError
from conf.load import load
from conf.schema import CompileConfig
from runtime.artifact import Artifact
from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.device.base import open_session
from runtime.request import Event, Request, SamplingParams

pytest.importorskip("transformers")
# Across pages (16), key blocks need no more than 78 tokens; one of one token.
# No pads (1), which XLM-R does not count as positions.
PROMPTS = [
    [2 + (7 * i * i + 3 * i + s) % 158 for i in range(n)] for s, n in enumerate((40, 5, 23, 1, 64))
]
TOYS = pytest.mark.parametrize("toy", EMBEDDERS, ids=lambda toy: toy.label)


def config_of(source: Path, *overrides: str) -> CompileConfig:
    return load(CompileConfig, "compile", ["model=hf", f"model.source={source}", *overrides]).config


def imported(source: Path, *overrides: str) -> Imported:
    return import_model(config_of(source, *overrides))


def compiled(source: Path, out: Path, *overrides: str) -> Artifact:
    given = ["dtype=float32", "name=toy", f"out={out}", "shape.max_seqs=8", *overrides]
    loaded = load(CompileConfig, "compile", ["model=hf", f"model.source={source}", *given])
    return Artifact.open(compile_model(loaded.config, loaded.sources, Progress()))


def embed(artifact: Artifact, prompts: list[list[int]], **options: Any) -> list[Event]:
    session = open_session(artifact, kv_tokens=1024)
    loop = EngineLoop(session, EngineOptions(artifact=str(artifact.path), **options), eos=())
    for id, tokens in enumerate(prompts):
        loop.add(Request(id=id, tokens=tokens, sampling=SamplingParams(max_new_tokens=0)))
    events = {}
    while loop.has_work:
        events |= {event.id: event for event in loop.step()}
    loop.idle()
    loop.close()
    return [events[id] for id in range(len(prompts))]


@TOYS
def test_vectors_equal_transformers(toy: Embedder, tmp_path: Path) -> None:
    """Several in one ragged batch, causal ones in chunks (max_tokens 16) too."""
    model = toy_embedders.save(toy, tmp_path / "toy")
    whole = toy.family in ("bert", "xlm-roberta") or toy.causal is False
    shape = ["shape.context=64", f"shape.max_tokens={64 if whole else 16}"]
    artifact = compiled(tmp_path / "toy", tmp_path / "out", *shape)
    info = artifact.manifest.model.embedding
    assert info is not None
    assert (info.dim, info.pooling, info.normalise) == (64, toy.pooling, toy.normalise)
    assert info.whole == whole and artifact.manifest.state.pages_offset > 0
    events = embed(artifact, PROMPTS)
    for tokens, event in zip(PROMPTS, events, strict=True):
        assert event.finish is not None and event.finish.reason == "length"
        want = toy_embedders.pooled(toy, toy_embedders.hidden(toy, model, tokens))
        got = np.frombuffer(event.embedding, "<f4")
        np.testing.assert_allclose(got, want.numpy(), atol=1e-4, rtol=1e-4)
    again = embed(artifact, PROMPTS[:1] * 3)  # alone, and after a cached prefix
    assert all(event.embedding == events[0].embedding for event in again)
    assert list(verify(artifact))[-1].endswith("golden ones repeated")


def test_direction_matters_and_can_be_chosen(tmp_path: Path) -> None:
    toy = next(toy for toy in EMBEDDERS if toy.label == "gte-qwen2")
    toy_embedders.save(toy, tmp_path)
    for overrides, causal in (((), False), (("model.causal=true",), True)):
        mixer = imported(tmp_path, *overrides).spec.layers[0].mixer
        assert isinstance(mixer, Attention) and mixer.causal is causal
    head = next(toy for toy in EMBEDDERS if toy.label == "gte-qwen2-causal")
    toy_embedders.save(replace(head, causal=False), tmp_path)
    with pytest.raises(CompileError, match="is_causal false"):
        imported(tmp_path, "model.pooling=none")


def test_quantized_and_bfloat16_vectors_stay_close(tmp_path: Path) -> None:
    toy = EMBEDDERS[0]
    model = toy_embedders.save(toy, tmp_path / "toy")
    want = toy_embedders.pooled(toy, toy_embedders.hidden(toy, model, PROMPTS[0])).numpy()
    for n, overrides in enumerate((["dtype=bfloat16"], ["quant=int8"])):
        artifact = compiled(tmp_path / "toy", tmp_path / f"{n}", "shape.max_tokens=80", *overrides)
        assert artifact.manifest.accuracy.keys() == {"vector_error", "vector_max", "device_error"}
        got = np.frombuffer(embed(artifact, PROMPTS[:1])[0].embedding, "<f4")
        assert float(got @ want) > 0.99
    with pytest.raises(CompileError, match=r"relative vector error .* exceeds accuracy.max_delta"):
        compiled(tmp_path / "toy", tmp_path / "x", "quant=int4", "accuracy.max_delta=1e-4")


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_old_spellings_of_encoder_files(prefix: str, tmp_path: Path) -> None:
    """With or without the prefix of a class with a head, gamma and beta, buffers and heads."""
    toy_embedders.save(EMBEDDERS[0], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    new = imported(tmp_path)
    want = {name: new.weights.fetch(name).clone() for name in logical_weights(new.spec)}
    renamed = {
        prefix
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    renamed[f"{prefix}embeddings.position_ids"] = torch.arange(80)[None]
    renamed["cls.predictions.bias"] = torch.zeros(160)
    save_file(renamed, path)
    model = imported(tmp_path)
    assert model.dtype == "float32"
    assert want.keys() == logical_weights(model.spec).keys()
    for name, weight in want.items():
        assert torch.equal(model.weights.fetch(name), weight)


# --- the scheduler --------------------------------------------------------------------------------


def test_whole_sequences_are_never_cut(tmp_path: Path) -> None:
    toy_embedders.save(EMBEDDERS[0], tmp_path / "toy")
    artifact = compiled(tmp_path / "toy", tmp_path / "out", "shape.max_tokens=80")
    assert artifact.manifest.model.context == 80
    alone = [embed(artifact, [tokens])[0].embedding for tokens in PROMPTS]
    together = embed(artifact, PROMPTS * 3, max_step_tokens=64, max_running=8)
    assert [event.embedding for event in together] == alone * 3
    assert all(event.cached_tokens == 0 for event in together)
    (refused,) = embed(artifact, [[1] * 65], max_step_tokens=64)
    assert refused.finish is not None and refused.finish.status == 400
    assert "65 tokens) is longer than a step (64 tokens)" in (refused.finish.message or "")
    (refused,) = embed(artifact, [[1] * 81])
    assert refused.finish is not None
    assert "(81 tokens) is longer than the model's context length (80" in str(refused.finish)


def test_generation_is_refused_by_the_engine(tmp_path: Path) -> None:
    toy_embedders.save(EMBEDDERS[0], tmp_path / "toy")
    artifact = compiled(tmp_path / "toy", tmp_path / "out", "shape.max_tokens=80")
    session = open_session(artifact, device="null")
    loop = EngineLoop(session, EngineOptions(artifact=str(artifact.path)), eos=())
    loop.add(Request(id=0, tokens=[1], sampling=SamplingParams(max_new_tokens=1)))
    (event,) = loop.step()
    assert event.finish is not None and "generates no text" in (event.finish.message or "")
    loop.add(Request(id=1, tokens=[1, 2], sampling=SamplingParams(max_new_tokens=0)))
    events = [event for _ in range(3) for event in loop.step()]
    vector = np.frombuffer(events[-1].embedding, "<f4")
    assert len(vector) == 64 and abs(float(vector @ vector) - 1) < 1e-5


# --- named shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", toy_embedders.PUBLISHED)
def test_named_embedding_models(name: str) -> None:
    config = load(CompileConfig, "compile", [f"model={name}", "weights=random"]).config
    spec = import_model(config).spec
    millions = spec.parameters() / 1e6
    assert millions == pytest.approx(toy_embedders.PUBLISHED[name], rel=0.01)
    assert isinstance(spec.head, PoolSpec) and spec.head.normalise
    assert spec.head.pooling == config.model.pooling
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, Attention)
    both_ways = spec.positions is not None or name == "gte-qwen2-7b"
    assert mixer.causal is not both_ways


# --- what the files say ---------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    toy_embedders.save(EMBEDDERS[0], tmp_path)
    return tmp_path


def test_pooling_comes_from_files_or_options(bert: Path) -> None:
    assert imported(bert).spec.head == PoolSpec(pooling="cls", normalise=True)
    chosen = imported(bert, "model.pooling=mean", "model.normalize=false").spec.head
    assert chosen == PoolSpec(pooling="mean", normalise=False)
    (bert / "modules.json").unlink()
    with pytest.raises(CompileError, match=r"without modules.json.*model.pooling=last"):
        imported(bert)
    with pytest.raises(CompileError, match=r"model.normalize=true\|false"):
        imported(bert, "model.pooling=mean")
    with pytest.raises(CompileError, match="no language model head"):
        imported(bert, "model.pooling=none")


def test_unknown_modules_and_modes_are_named(bert: Path) -> None:
    pooling = bert / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(CompileError, match="pooling_mode_max_tokens is not supported"):
        imported(bert)
    modules = json.loads((bert / "modules.json").read_text())
    modules.append({"type": "sentence_transformers.models.Dense", "path": "3_Dense"})
    toy_embedders.write_sentence_files(bert, "cls", True)
    (bert / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CompileError, match="module 'Dense' is not supported"):
        imported(bert)


def test_newer_pooling_files_name_their_mode(bert: Path) -> None:
    path = bert / "1_Pooling" / "config.json"
    path.write_text('{"embedding_dimension": 64, "pooling_mode": "mean"}')
    assert imported(bert).spec.head == PoolSpec(pooling="mean", normalise=True)
    path.write_text('{"pooling_mode": "weightedmean"}')
    with pytest.raises(CompileError, match="pooling"):
        imported(bert)


def test_context_is_the_shorter_of_both_files(bert: Path) -> None:
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    assert imported(bert).spec.context == 32
    # The checks of a named shape know of both.
    assert imported(bert, "model.config.hidden_size=64").spec.context == 32
    with pytest.raises(CompileError, match="disagree about layers"):
        imported(bert, "model.config.num_hidden_layers=2")


def test_dimensions_are_checked(bert: Path) -> None:
    assert imported(bert, "model.dimensions=[32,16]").dimensions == (16, 32)
    path = bert / "config.json"
    config = json.loads(path.read_text()) | {"matryoshka_dimensions": [8, 64]}
    path.write_text(json.dumps(config))
    assert imported(bert).dimensions == (8, 64)
    with pytest.raises(CompileError, match=r"model.dimensions=65: .* vectors of 64 numbers"):
        imported(bert, "model.dimensions=[65]")


def test_options_of_embedding_models_mean_nothing_to_others() -> None:
    for override in ("model.normalize=true", "model.causal=false", "model.dimensions=[8]"):
        config = load(CompileConfig, "compile", ["model=tiny", override]).config
        with pytest.raises(CompileError, match="only an embedding model has it"):
            import_model(config)


def test_a_context_no_step_holds_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"context=64: exceeds shape.max_tokens=16.*one step"):
        compiled(bert, tmp_path / "out", "shape.context=64", "shape.max_tokens=16")


def test_a_generator_can_be_made_an_embedder(tmp_path: Path) -> None:
    """As for gte-Qwen2 without its sentence-transformers files."""
    toy_embedders.save(EMBEDDERS[4], tmp_path, files=False)
    assert not isinstance(imported(tmp_path).spec.head, PoolSpec)
    head = imported(tmp_path, "model.pooling=last", "model.normalize=true").spec.head
    assert head == PoolSpec(pooling="last", normalise=True)
