"""Toy embedding checkpoints made by transformers, with the files sentence-transformers puts beside
them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ENCODER = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
DECODER = {
    **ENCODER,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
MODES = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}

# Parameters in millions, as the publishers' weight files hold them (gte: without the head, which an
# embedding model leaves; encoders: with a pooler of dim^2, which it leaves too).
PUBLISHED = {
    "bge-small-en": 33.36,
    "bge-base-en": 109.48,
    "bge-large-en": 335.14,
    "bge-m3": 567.75,
    "all-minilm-l6": 22.71,
    "e5-base": 109.48,
    "multilingual-e5-large": 559.89,
    "e5-mistral-7b": 7110.66,
    "gte-qwen2-1.5b": 1776.2 - 232.9,
    "gte-qwen2-7b": 7613.0 - 543.5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """`causal`: what config.json says, if it says anything. `with_head`: saved from the class that
    generates."""

    label: str
    family: str
    config: str
    model: str
    pooling: str
    normalise: bool
    values: dict[str, Any] = field(default_factory=dict)
    causal: bool | None = None


BERT = {**ENCODER, "max_position_embeddings": 80}
XLM_R = {**ENCODER, "max_position_embeddings": 82, "type_vocab_size": 1, "pad_token_id": 1}
EMBEDDERS = [
    Embedder(
        label="bge",
        family="bert",
        config="BertConfig",
        model="BertModel",
        pooling="cls",
        normalise=True,
        values=BERT,
    ),
    Embedder(
        label="minilm",
        family="bert",
        config="BertConfig",
        model="BertModel",
        pooling="mean",
        normalise=True,
        values={**BERT, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5},
    ),
    Embedder(
        label="bge-m3",
        family="xlm-roberta",
        config="XLMRobertaConfig",
        model="XLMRobertaModel",
        pooling="cls",
        normalise=False,
        values=XLM_R,
    ),
    Embedder(
        label="e5-mistral",
        family="mistral",
        config="MistralConfig",
        model="MistralModel",
        pooling="last",
        normalise=True,
        values={**DECODER, "sliding_window": 20},
    ),
    Embedder(
        label="gte-qwen2-causal",
        family="qwen2",
        config="Qwen2Config",
        model="Qwen2ForCausalLM",
        pooling="last",
        normalise=True,
        values=DECODER,
    ),
    Embedder(
        label="gte-qwen2",
        family="qwen2",
        config="Qwen2Config",
        model="Qwen2Model",
        pooling="last",
        normalise=True,
        values=DECODER,
        causal=False,
    ),
    Embedder(
        label="qwen3-embedding",
        family="qwen3",
        config="Qwen3Config",
        model="Qwen3ForCausalLM",
        pooling="last",
        normalise=True,
        values={**DECODER, "head_dim": 16},
    ),
]


def save(toy: Embedder, directory: Path, *, files: bool = True) -> Any:
    """The transformers model, every weight random, and its directory."""
    import transformers

    config = getattr(transformers, toy.config)(**toy.values)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, toy.model)(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            ones = "norm" in name.lower() and name.endswith("weight")
            p.copy_(torch.randn_like(p) * 0.2 + ones)
    model = model.float().eval()
    model.save_pretrained(directory)
    if toy.causal is not None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "is_causal": toy.causal}))
    if files:
        write_sentence_files(directory, toy.pooling, toy.normalise)
    return model


def write_sentence_files(directory: Path, pooling: str, normalise: bool) -> None:
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    kinds += [("Normalize", "2_Normalize")] if normalise else []
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    values = {key: mode == pooling for mode, key in MODES.items()}
    values["pooling_mode_max_tokens"] = False
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(values))


def hidden(toy: Embedder, model: Any, tokens: list[int]) -> torch.Tensor:
    """Last hidden states of one sequence, [tokens, dim]."""
    base = getattr(model, "model", model)
    more = {}
    if toy.causal is False:  # both ways: nothing is masked
        zeros = torch.zeros(1, 1, len(tokens), len(tokens))
        more = {"attention_mask": {"full_attention": zeros}}
    with torch.inference_mode():
        return base(torch.tensor([tokens]), **more).last_hidden_state[0]


def pooled(toy: Embedder, states: torch.Tensor) -> torch.Tensor:
    """By the formulas, in float64."""
    x = states.double()
    vector = {"cls": x[0], "last": x[-1], "mean": x.sum(0) / len(x)}[toy.pooling]
    return vector / vector.pow(2).sum().sqrt() if toy.normalise else vector
