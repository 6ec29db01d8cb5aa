"""What a tokenizer class does beyond its vocabulary file: the split pattern and special tokens a
rank file does not hold, tokens put before and after every text.

The facts stand in the classes' own code (transformers, or a Python file in the checkpoint, which we
never run). Used by `compiler.tokenizer_source` and `compiler.text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")  # one digit a token
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """`pattern`: how text is cut before byte pairs are merged (rank files only). `nfc`: text is
    normalised first. `specials`: control tokens of the class, at the ids after the file's own.
    `words`: those of them that are words of a language too, matched only when they stand alone.
    `prefix`: tokens before every text. `adds_bos`: add_bos_token when the file leaves it out.
    `flags`: add_bos_token and add_eos_token of the file count. `ends`: tokens that end an answer
    in a chat, where the class's code says so and no file does.
    """

    pattern: str | None = None
    nfc: bool = False
    specials: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    adds_bos: bool = False
    flags: bool = True
    ends: tuple[str, ...] = ()


LLAMA = Rules(adds_bos=True)
CHATGLM = Rules(
    specials=(
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "sop",
        "eop",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ),
    words=("sop", "eop"),
    prefix=("[gMASK]", "sop"),
    flags=False,
    ends=("<|user|>", "<|observation|>"),
)
CLASSES = {
    "Llama": LLAMA,
    "CodeLlama": LLAMA,
    "Gemma": LLAMA,
    "Baichuan": LLAMA,
    "InternLM2": LLAMA,
    "ChatGLM": CHATGLM,
    "ChatGLM4": Rules(pattern=CL100K, prefix=("[gMASK]", "<sop>"), flags=False),
    "QWen": Rules(
        pattern=QWEN,
        nfc=True,
        specials=(
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            *tuple(f"<|extra_{i}|>" for i in range(205)),
        ),
        flags=False,
        ends=("<|im_end|>",),
    ),
    "TiktokenTokenizerWrapper": Rules(pattern=CL100K, flags=False),  # DBRX
    "GPT4": Rules(pattern=CL100K, flags=False),
    "O200k": Rules(pattern=O200K, flags=False),
}


def class_name(settings: Mapping[str, Any]) -> str:
    """The file's `tokenizer_class` without the endings that say nothing: QWen, Llama, …"""
    name = str(settings.get("tokenizer_class") or "")
    return name.removesuffix("Fast").removesuffix("Tokenizer")


def rules_of(settings: Mapping[str, Any]) -> Rules:
    """A class without rules honours no flag, unless it comes as code with the checkpoint."""
    return CLASSES.get(class_name(settings), Rules(flags="auto_map" in settings))
