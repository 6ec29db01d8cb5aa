"""Recipes of the families with experts or latent attention, and how those without a class of their
own are published (the reference is then a construction of equal value from another class).
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from toy_exports import COMMON, Exported, Tensors
from toy_recipe import BASE, YARN, Recipe

Values = dict[str, Any]
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
DEEPSEEK = {
    **MOE,
    **LATENT,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}


def twins(model: Any) -> None:
    """Experts 0 and 1 are the same in every layer: their scores tie, and whichever is chosen the
    result is the same."""
    for name, p in model.named_parameters():
        if re.search(r"(gate|router)\.weight$", name) or ".experts." in name:
            p[1] = p[0]


def halved_shared_gate(model: Any) -> None:
    """Qwen2-MoE without a gate: sigmoid(0) = 1/2 of a doubled output."""
    for name, p in model.named_parameters():
        if name.endswith("shared_expert_gate.weight"):
            p.zero_()


def qwen2_moe_as(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors of Qwen2-MoE with experts one by one and plain shared experts under `prefix`."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("shared_expert.down_proj.weight"):
            tensor = tensor / 2
        before, _, kind = name.partition("mlp.experts.")
        if kind:
            result |= one_by_one(
                tensor,
                kind,
                [f"{before}mlp.experts.{{e}}.{n}_proj.weight" for n in ("gate", "up", "down")],
            )
        elif not name.endswith("shared_expert_gate.weight"):
            result[name.replace("mlp.shared_expert.", prefix)] = tensor
    return result


def one_by_one(tensor: torch.Tensor, kind: str, names: list[str]) -> dict[str, torch.Tensor]:
    """The experts of a fused tensor; `names`: of gate, up and down, with `{e}`."""
    result = {}
    for e, one in enumerate(tensor):
        if kind == "down_proj":
            result[names[2].format(e=e)] = one
        else:
            for name, half in zip(names, one.chunk(2), strict=False):
                result[name.format(e=e)] = half
    return result


def deepseek_v1(config: Values, tensors: Tensors) -> Exported:
    keys = (*COMMON, "num_key_value_heads", "moe_intermediate_size", "num_experts_per_tok")
    own = {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "attention_bias": False,
        "rope_theta": config["rope_theta"],
        "rope_scaling": None,
    }
    return {key: config[key] for key in keys} | own, qwen2_moe_as("mlp.shared_experts.", tensors)


def xverse_moe(config: Values, tensors: Tensors) -> Exported:
    """The smaller one says that it is dense; the width of an expert is called intermediate_size."""
    own = {
        "architectures": ["XverseForCausalLM"],
        "model_type": "xverse",
        "intermediate_size": config["moe_intermediate_size"],
        "num_experts": config["num_experts"],
        "moe_top_k": config["num_experts_per_tok"],
        "num_shared_experts": 2,
        "rope_theta": config["rope_theta"],
        "max_tokenizer_truncation": 256,
    }
    named = {
        name.replace("mlp.gate.", "mlp.router."): tensor
        for name, tensor in qwen2_moe_as("mlp.shared_experts.", tensors).items()
    }
    return {key: config[key] for key in COMMON} | own, named


def grok_blocks(model: Any) -> None:
    """Gemma-2 with OLMoE's experts in place of its ffn."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(
        hidden_size=64,
        intermediate_size=96,
        num_experts=4,
        num_experts_per_tok=2,
        hidden_act="gelu_pytorch_tanh",
        experts_implementation="eager",
    )
    for layer in model.model.layers:
        layer.mlp = OlmoeSparseMoeBlock(config)
        for p in layer.mlp.parameters():
            p.copy_(torch.randn_like(p) * 0.2)


def grok(config: Values, tensors: Tensors, *, port: bool) -> Exported:
    names = {
        "input_layernorm": "pre_attn_norm",
        "post_attention_layernorm": "post_attn_norm",
        "pre_feedforward_layernorm": "pre_moe_norm",
        "post_feedforward_layernorm": "post_moe_norm",
        "self_attn": "attn" if port else "self_attn",
        "mlp.gate": "moe_block.gate" if port else "block_sparse_moe.gate",
    }
    experts = "moe_block.experts" if port else "block_sparse_moe.experts"
    parts = ("linear", "linear_v", "linear_1") if port else ("w1", "w3", "w2")
    result = {}
    for name, tensor in tensors.items():
        for theirs, own in names.items():
            name = name.replace(f".{theirs}.", f".{own}.")
        if name.endswith("norm.weight"):
            tensor = tensor + 1  # Gemma keeps w - 1
            name = name.removesuffix("weight") + ("scale" if port else "weight")
        if name == "lm_head.weight":
            tensor = tensor / 0.5
        before, _, kind = name.partition("mlp.experts.")
        if kind:
            result |= one_by_one(
                tensor, kind, [f"{before}{experts}.{{e}}.{part}.weight" for part in parts]
            )
        else:
            result[name] = tensor
    own = {
        "architectures": ["Grok1ModelForCausalLM" if port else "Grok1ForCausalLM"],
        "model_type": "grok-1",
        "num_key_value_heads": config["num_key_value_heads"],
        "tie_word_embeddings": False,
        "attn_output_multiplier": 0.25,
        "max_attn_value" if port else "attn_logit_softcapping": 3.0,
        "embedding_multiplier_scale": 8.0,
        "output_multiplier_scale": 0.5,
        "num_experts" if port else "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_act": "gelu",
    }
    return {key: config[key] for key in COMMON if key in config} | own, result


GROK = {
    "head_dim": 16,
    "layer_types": ["full_attention"] * 2,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": None,
    "tie_word_embeddings": False,
}


XVERSE_MOE = Recipe(
    label="shared",
    config_class="Qwen2MoeConfig",
    values={
        **MOE,
        "num_experts": 6,
        "num_key_value_heads": 4,
        "shared_expert_intermediate_size": 64,
        "qkv_bias": False,
        "norm_topk_prob": True,
    },
    theta=5e5,
    change=halved_shared_gate,
    export=xverse_moe,
    more_parameters=-128,
)


MOE_RECIPES: dict[str, list[Recipe]] = {
    "mixtral": [
        Recipe(
            label="plain",
            config_class="MixtralConfig",
            theta=1e6,
            values={"num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        Recipe(
            label="window-twins",
            config_class="MixtralConfig",
            values={"num_local_experts": 5, "head_dim": 32, "sliding_window": 4},
            change=twins,
        ),
    ],
    "qwen2_moe": [
        Recipe(
            label="plain",
            config_class="Qwen2MoeConfig",
            values={**MOE, "num_experts": 6, "shared_expert_intermediate_size": 48},
        ),
        Recipe(
            label="dense-layers",
            config_class="Qwen2MoeConfig",
            values={
                **MOE,
                "num_experts": 6,
                "shared_expert_intermediate_size": 48,
                "mlp_only_layers": [0],
                "qkv_bias": False,
                "norm_topk_prob": True,
                "use_sliding_window": True,
                "sliding_window": 4,
            },
        ),
    ],
    "qwen3_moe": [
        Recipe(
            label="plain",
            config_class="Qwen3MoeConfig",
            values={**MOE, "num_experts": 6, "head_dim": 48, "norm_topk_prob": True},
        ),
        Recipe(
            label="sparse-steps",
            config_class="Qwen3MoeConfig",
            values={
                **MOE,
                "num_experts": 6,
                "head_dim": 32,
                "decoder_sparse_step": 2,
                "attention_bias": True,
            },
            rope=YARN,
        ),
    ],
    "deepseek": [
        Recipe(
            label="v1",
            config_class="Qwen2MoeConfig",
            values={
                **MOE,
                "num_experts": 6,
                "num_key_value_heads": 4,
                "shared_expert_intermediate_size": 64,
                "mlp_only_layers": [0],
                "qkv_bias": False,
            },
            change=halved_shared_gate,
            export=deepseek_v1,
            more_parameters=-64,
        )
    ],
    "deepseek_v2": [
        Recipe(
            label="lite",
            config_class="DeepseekV2Config",
            values={**DEEPSEEK, "q_lora_rank": None},
            rope={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        ),
        Recipe(
            label="groups",
            config_class="DeepseekV2Config",
            values={
                **DEEPSEEK,
                **GROUPS,
                "q_lora_rank": 24,
                "topk_method": "group_limited_greedy",
                "routed_scaling_factor": 16.0,
                "attention_bias": True,
            },
        ),
    ],
    "deepseek_v3": [
        Recipe(
            label="groups",
            config_class="DeepseekV3Config",
            values={**DEEPSEEK, **GROUPS, "q_lora_rank": 24, "n_shared_experts": 1},
            rope={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            more_parameters=16,  # corrections: buffers of the class
        ),
        Recipe(
            label="halves",
            config_class="DeepseekV3Config",
            values={**DEEPSEEK, **GROUPS, "q_lora_rank": None, "rope_interleave": False},
            change=twins,
            more_parameters=16,
        ),
    ],
    "minicpm3": [
        Recipe(
            label="longrope",
            config_class="MiniCPM3Config",
            values={
                **LATENT,
                "q_lora_rank": 24,
                "v_head_dim": 16,
                "scale_emb": 12,
                "scale_depth": 1.4,
                "dim_model_base": 16,
            },
            rope={
                "rope_type": "longrope",
                "short_factor": [1.1, 1.3, 2.0, 5.0, 5.1, 5.2, 5.3, 5.4],
                "long_factor": [1.1, 1.3, 2.0, 5.0, 5.1, 5.2, 5.3, 5.4],
                "original_max_position_embeddings": 32,
            },
        ),
    ],
    "dbrx": [
        Recipe(
            label="clip",
            config_class="DbrxConfig",
            values={
                "d_model": 64,
                "n_heads": 4,
                "n_layers": 2,
                "max_seq_len": 256,
                "attn_config": {"clip_qkv": 1.5, "kv_n_heads": 2, "rope_theta": 5e5},
                "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
            },
            theta=5e5,
            base={key: BASE[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
        ),
    ],
    "grok": [
        Recipe(
            label="port",
            config_class="Gemma2Config",
            values=GROK,
            change=grok_blocks,
            export=partial(grok, port=True),
        )
    ],
    "grok_engine": [
        Recipe(
            label="engine",
            config_class="Gemma2Config",
            values=GROK,
            change=grok_blocks,
            export=partial(grok, port=False),
        )
    ],
    "olmoe": [
        Recipe(
            label="clip",
            config_class="OlmoeConfig",
            values={"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 1.5},
        ),
        Recipe(
            label="twins",
            config_class="OlmoeConfig",
            values={"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 4},
            change=twins,
        ),
    ],
    "gpt_oss": [
        Recipe(
            label="plain",
            config_class="GptOssConfig",
            values={
                "head_dim": 16,
                "num_local_experts": 5,
                "num_experts_per_tok": 2,
                "sliding_window": 4,
            },
            theta=150000.0,
            rope={**YARN, "truncate": False},
        ),
    ],
}
