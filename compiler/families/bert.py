"""BERT encoders (bge, e5, MiniLM, gte-base) and XLM-R, the same with positions counted from
padding_idx + 1.

How hidden states are pooled is no matter of the encoder: `compiler.embedding` decides it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from compiler.checkpoint import ConfigReader
from compiler.errors import DamagedCheckpoint
from compiler.families.decoder import QKVO
from compiler.families.family import Family, register
from compiler.families.names import named
from compiler.families.spec import (
    Attention,
    LayerNorm,
    LayerSpec,
    ModelSpec,
    PlainFfn,
    PoolSpec,
    PositionSpec,
)

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
NAMES = {
    "embed": "embeddings.word_embeddings",
    "position_table": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "layer": "encoder.layer.{i}",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
OUTSIDE = ("embed", "position_table", "token_types", "embed_norm", "layer")  # of a layer


def encoder_family(
    name: str, bases: tuple[str, ...], prefix: str, spec: Callable[[ConfigReader], ModelSpec]
) -> Family:
    """`prefix`: what names begin with in files saved from a class with a head."""
    modules = {key: (prefix if key in OUTSIDE else "") + module for key, module in NAMES.items()}
    own = rf"(?:{re.escape(prefix)})?"
    return Family(
        name=name,
        architectures=(),
        bases=bases,
        spec=spec,
        names=named(modules),
        prefix=prefix,
        unused=(
            rf"{own}pooler\..*",
            rf"{own}embeddings\.(?:position|token_type)_ids",
            r"(?:cls|lm_head)\..*",
        ),
    )


def encoder(config: ConfigReader, name: str, offset: int) -> ModelSpec:
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    rows = config.integer("max_position_embeddings")
    if dim % heads:
        raise DamagedCheckpoint(
            f"{config.where}: hidden_size {dim} is no multiple of {heads} heads"
        )
    config.require("position_embedding_type", ("absolute",), "absolute")
    config.require("hidden_act", tuple(ACTIVATIONS), "gelu")
    # Of heads we do not have, and of training.
    config.value("classifier_dropout", float, None)
    config.value("gradient_checkpointing", bool, False)
    config.value("tie_word_embeddings", bool, True)
    norm = LayerNorm(eps=config.number("layer_norm_eps", 1e-12), bias=True)
    layer = LayerSpec(
        mixer=Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=dim // heads,
            rope=None,
            scale=(dim // heads) ** -0.5,
            biases=QKVO,
            causal=False,
        ),
        ffn=PlainFfn(
            width=config.integer("intermediate_size"),
            act=ACTIVATIONS[config.text("hidden_act", "gelu")],  # type: ignore[arg-type]
            bias=True,
        ),
        norm=norm,
        placement="post",
    )
    return ModelSpec(
        family=name,
        dim=dim,
        vocab=config.integer("vocab_size"),
        context=rows - offset,
        layers=(layer,) * config.integer("num_hidden_layers"),
        final_norm=None,
        head=PoolSpec(pooling="cls", normalise=False),
        positions=PositionSpec(
            rows=rows, offset=offset, types=config.integer("type_vocab_size", 2), norm=norm
        ),
    )


def spec_bert(config: ConfigReader) -> ModelSpec:
    return encoder(config, "bert", 0)


def spec_xlm_roberta(config: ConfigReader) -> ModelSpec:
    return encoder(config, "xlm-roberta", config.value("pad_token_id", int, 1) + 1)


BERT = register(encoder_family("bert", ("BertModel",), "bert.", spec_bert))
XLM_ROBERTA = register(
    encoder_family("xlm-roberta", ("XLMRobertaModel", "RobertaModel"), "roberta.", spec_xlm_roberta)
)
