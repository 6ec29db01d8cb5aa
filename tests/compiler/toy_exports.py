"""Weights and configs of a transformers class under the names and keys of a family that has no
class: each function takes a config in the spelling of transformers 4 and a state dict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from toy_references import QWEN_LENGTH

Tensors = Mapping[str, Tensor]
Exported = tuple[dict[str, Any], dict[str, Tensor]]


def renamed(tensors: Tensors, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Each name rewritten by every pattern in turn."""
    out = {}
    for name, tensor in tensors.items():
        for pattern, new in names.items():
            name = re.sub(pattern, new, name)
        out[name] = tensor
    return out


def stacked(tensors: dict[str, Tensor], parts: tuple[str, ...], name: str) -> dict[str, Tensor]:
    """Tensors `<before><part><after>` stacked along rows into `<before><name><after>`."""
    out = dict(tensors)
    for tensor in tensors:
        if parts[0] in tensor:
            out[tensor.replace(parts[0], name)] = torch.cat(
                [out.pop(tensor.replace(parts[0], part)) for part in parts]
            )
    return out


def picked(config: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    return {own: config[usual] for own, usual in keys.items()}


COMMON = {
    key: key
    for key in (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "torch_dtype",
    )
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def qwen(config: dict[str, Any], tensors: Tensors) -> Exported:
    names = {
        r"model\.layers": "transformer.h",
        r"self_attn\.o_proj": "attn.c_proj",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        r"mlp\.gate_proj": "mlp.w2",
        r"mlp\.up_proj": "mlp.w1",
        r"mlp\.down_proj": "mlp.c_proj",
        r"model\.embed_tokens": "transformer.wte",
        r"model\.norm": "transformer.ln_f",
    }
    packed = stacked(dict(tensors), QKV, "attn.c_attn")
    values = picked(config, {k: v for k, v in COMMON.items() if k not in ("hidden_act",)})
    del values["rms_norm_eps"]
    return {
        **values,
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "intermediate_size": 2 * config["intermediate_size"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "no_bias": True,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": QWEN_LENGTH,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "use_flash_attn": "auto",
        "bf16": False,
        "fp16": False,
        "fp32": True,
        "scale_attn_weights": True,
        "onnx_safe": None,
        "tie_word_embeddings": False,
    }, renamed(packed, names)


def chatglm(config: dict[str, Any], tensors: Tensors) -> Exported:
    names = {
        r"model\.layers": "transformer.encoder.layers",
        r"self_attn\.o_proj": "self_attention.dense",
        r"mlp\.gate_up_proj": "mlp.dense_h_to_4h",
        r"mlp\.down_proj": "mlp.dense_4h_to_h",
        r"model\.embed_tokens": "transformer.embedding.word_embeddings",
        r"model\.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
    }
    packed = stacked(dict(tensors), QKV, "self_attention.query_key_value")
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        **picked(
            config,
            {
                "num_layers": "num_hidden_layers",
                "padded_vocab_size": "vocab_size",
                "hidden_size": "hidden_size",
                "ffn_hidden_size": "intermediate_size",
                "kv_channels": "head_dim",
                "num_attention_heads": "num_attention_heads",
                "multi_query_group_num": "num_key_value_heads",
                "layernorm_epsilon": "rms_norm_eps",
                "seq_length": "max_position_embeddings",
                "torch_dtype": "torch_dtype",
            },
        ),
        "rope_ratio": config["rope_theta"] / 10000,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "classifier_dropout": None,
        "fp32_residual_connection": False,
        "interleaved_qkv": False,
        "multi_query_attention": True,
        "original_rope": True,
        "post_layer_norm": True,
        "rmsnorm": True,
        "pre_seq_len": None,
        "prefix_projection": False,
        "quantization_bit": 0,
        "tie_word_embeddings": False,
    }, renamed(packed, names)


def chatglm2_32k(config: dict[str, Any], tensors: Tensors) -> Exported:
    """Positions divided by the ratio, which only the name tells."""
    factor = config["rope_scaling"]["factor"]
    values, weights = chatglm(config, tensors)
    return {**values, "rope_ratio": factor, "_name_or_path": "THUDM/chatglm2-6b-32k"}, weights


def internlm2(config: dict[str, Any], tensors: Tensors) -> Exported:
    names = {
        r"model\.embed_tokens": "model.tok_embeddings",
        r"self_attn\.o_proj": "attention.wo",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        r"mlp\.gate_proj": "feed_forward.w1",
        r"mlp\.up_proj": "feed_forward.w3",
        r"mlp\.down_proj": "feed_forward.w2",
        "lm_head": "output",
    }
    out = dict(tensors)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for i in range(config["num_hidden_layers"]):
        q, k, v = (out.pop(f"model.layers.{i}.{part}.weight") for part in QKV)
        groups = [
            torch.cat(
                (*q.chunk(heads)[g * heads // kv_heads : (g + 1) * heads // kv_heads], one, two)
            )
            for g, (one, two) in enumerate(zip(k.chunk(kv_heads), v.chunk(kv_heads), strict=True))
        ]
        out[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat(groups)
    return {
        **picked(config, COMMON),
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "num_key_value_heads": kv_heads,
        "bias": False,
        "rope_theta": config["rope_theta"],
        "rope_scaling": config["rope_scaling"],
        "attn_implementation": "eager",
        "tie_word_embeddings": False,
    }, renamed(out, names)


def exaone(config: dict[str, Any], tensors: Tensors) -> Exported:
    names = {
        r"model\.layers": "transformer.h",
        r"self_attn\.o_proj": "attn.attention.out_proj",
        r"self_attn\.(.)_proj": r"attn.attention.\1_proj",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        r"mlp\.gate_proj": "mlp.c_fc_0",
        r"mlp\.up_proj": "mlp.c_fc_1",
        r"mlp\.down_proj": "mlp.c_proj",
        r"model\.embed_tokens": "transformer.wte",
        r"model\.norm": "transformer.ln_f",
    }
    scaling = dict(config["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type")
    return {
        "architectures": ["ExaoneForCausalLM"],
        "model_type": "exaone",
        **picked(
            config,
            {
                "num_layers": "num_hidden_layers",
                "activation_function": "hidden_act",
                "layer_norm_epsilon": "rms_norm_eps",
                "hidden_size": "hidden_size",
                "head_dim": "head_dim",
                "intermediate_size": "intermediate_size",
                "max_position_embeddings": "max_position_embeddings",
                "num_attention_heads": "num_attention_heads",
                "num_key_value_heads": "num_key_value_heads",
                "rope_theta": "rope_theta",
                "torch_dtype": "torch_dtype",
                "vocab_size": "vocab_size",
            },
        ),
        "rope_scaling": scaling,
        "embed_dropout": 0.0,
        "tie_word_embeddings": False,
    }, renamed(tensors, names)


def _baichuan(config: dict[str, Any], tensors: Tensors) -> Exported:
    return {
        **picked(config, COMMON),
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "model_max_length": config["max_position_embeddings"],
        "_from_model_config": True,
        "z_loss_weight": 0,
        "tie_word_embeddings": False,
    }, stacked(dict(tensors), QKV, "self_attn.W_pack")


def baichuan_7b(config: dict[str, Any], tensors: Tensors) -> Exported:
    """The reference's head has rows of length 1; the checkpoint's may have any length."""
    head = tensors["lm_head.weight"]
    values, weights = _baichuan(config, tensors)
    weights["lm_head.weight"] = head.clone()
    head.copy_(head / head.norm(dim=1, keepdim=True))
    return values, weights


def baichuan_13b(config: dict[str, Any], tensors: Tensors) -> Exported:
    values, weights = _baichuan(config, tensors)
    del values["max_position_embeddings"]
    return values, weights


def minicpm(config: dict[str, Any], tensors: Tensors) -> Exported:
    weights = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    return {
        **picked(config, COMMON),
        "architectures": ["MiniCPMForCausalLM"],  # its files have no model_type
        "num_key_value_heads": config["num_key_value_heads"],
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "rope_scaling": None,
    }, weights


def xverse(config: dict[str, Any], tensors: Tensors) -> Exported:
    return {
        **picked(config, COMMON),
        "architectures": ["XverseForCausalLM"],
        "model_type": "xverse",
        "num_key_value_heads": config["num_key_value_heads"],
        "max_tokenizer_truncation": 256,
        "tie_word_embeddings": False,
    }, dict(tensors)


def gemma3_multimodal(config: dict[str, Any], tensors: Tensors) -> Exported:
    """Sizes that equal the class defaults are left out of the text section, as published."""
    weights = {
        f"language_model.{name}": t for name, t in tensors.items() if name != "lm_head.weight"
    }
    vision = {
        "vision_tower.vision_model.post_layernorm.weight": torch.ones(4),
        "multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(4),
    }
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window", "vocab_size")
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": {**{key: config[key] for key in keys}, "model_type": "gemma3_text"},
        "vision_config": {"hidden_size": 4},
        "torch_dtype": "float32",
        "eos_token_id": [1, 106],
    }, {**weights, **vision}
