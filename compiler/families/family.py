"""The `Family` record and the registry: which `architectures` entry is read by whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compiler.checkpoint import ConfigReader
from compiler.errors import CompileError
from compiler.families.names import Names
from compiler.families.spec import ModelSpec, PoolSpec

# Keys that say nothing about the forward pass of an inference engine: training, saving, library
# switches.
IGNORABLE_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _commit_hash _name_or_path add_cross_attention architectures attention_dropout
    attention_probs_dropout_prob auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
    eos_token_id experts_implementation exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id hidden_dropout hidden_dropout_prob id2label
    initializer_range is_causal is_decoder is_encoder_decoder is_llama_config
    keys_to_ignore_at_inference label2id length_penalty max_length max_new_tokens min_length
    matryoshka_dimensions min_p mlp_dropout model_type no_repeat_ngram_size num_beam_groups
    num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    prefix pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty
    resid_pdrop return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
    top_k top_p torch_dtype torchscript transformers_version typical_p unk_token_id
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict vocab_file
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`spec` reads every key of a config.json that matters; `names` locates every weight; `unused`
    are patterns of tensors a checkpoint may hold beyond that, with `{layers}` for the number of
    layers. `bases`: the same model's architectures without a head; `prefix`: what all names but the
    head's begin with, and checkpoints of the base model leave out. `spelling`: the family's own
    names of config keys; `defaults`: what its class assumes where a key is missing; `ignored`: keys
    that say nothing about the forward pass, separated by spaces.
    """

    name: str
    architectures: tuple[str, ...]
    spec: Callable[[ConfigReader], ModelSpec]
    names: Names
    bases: tuple[str, ...] = ()
    prefix: str = ""
    unused: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    spelling: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: str = ""

    def read(self, config: ConfigReader) -> ModelSpec:
        config = config.translated(self.spelling, self.defaults)
        spec = self.spec(config)
        config.finish(IGNORABLE_KEYS.union(self.ignored.split()))
        return spec

    def ignorable_tensors(self, spec: ModelSpec) -> tuple[str, ...]:
        """A tied head is the embedding; files that store it again are read as if they did not. A
        pooled model leaves its head."""
        spare = spec.tied or isinstance(spec.head, PoolSpec)
        unused = tuple(p.replace("{layers}", str(len(spec.layers))) for p in self.unused)
        return (*unused, r"lm_head\.weight") if spare else unused


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    if family.name in FAMILIES:
        raise ValueError(f"family {family.name!r} is registered twice")
    FAMILIES[family.name] = family
    return family


def family_of(config: ConfigReader) -> Family:
    """The family answering to the config's `architectures`."""
    architectures = config.value("architectures", list)
    for family in FAMILIES.values():
        if architectures and architectures[0] in (*family.architectures, *family.bases):
            return family
    known = sorted(a for f in FAMILIES.values() for a in (*f.architectures, *f.bases))
    raise CompileError(
        f"{config.where}: architecture {architectures} is not supported; "
        f"supported: {', '.join(known)}"
    )
