"""Small tokenizers of the kinds checkpoints bring, trained on the spot."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from runtime.text import tokenizer as ours

CORPUS = [
    "the quick brown fox jumps over the lazy dog " * 5,
    "Grüße aus Köln, schöne Straße " * 5,
    "漢字かな交じり文 и русский текст 🎉👩‍👩‍👧 " * 5,
]
SPECIALS = ["<|bos|>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    """As Llama 3, Qwen, SmolLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[AddedToken(text, special=True) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral: pieces with a visible space, bytes for unknown characters."""
    specials = [*SPECIALS, "<unk>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(
        CORPUS[:2],
        trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False),
    )
    document: dict[str, Any] = json.loads(trained.to_str())
    vocab = document["model"]["vocab"]
    for token in byte_tokens:
        vocab.setdefault(token, len(vocab))
    document["model"]["byte_fallback"] = True
    document["model"]["fuse_unk"] = True
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """A decoder that is no concatenation: the fallback path."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", *SPECIALS], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_first() -> Tokenizer:
    """As newer Llama and Mistral files: the visible space stands before the first word alone."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def sentencepiece_stripping() -> Tokenizer:
    """As Phi: control tokens that take the spaces behind them."""
    document: dict[str, Any] = json.loads(sentencepiece().to_str())
    for token in document["added_tokens"]:
        token["rstrip"] = True
    return Tokenizer.from_str(json.dumps(document))


def unigram() -> Tokenizer:
    """As T5 and XLM-R: control tokens are pieces of the model, with the best score of all."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        [*CORPUS, "<|im_start|> </s> system obey"],
        trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=[*SPECIALS, "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    return tokenizer


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "other": word_piece}
CHAT_KINDS = KINDS | {
    "sentencepiece_first": sentencepiece_first,
    "sentencepiece_stripping": sentencepiece_stripping,
    "unigram": unigram,
}


def load(kind: str) -> ours.Tokenizer:
    config = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    files = {
        "tokenizer.json": CHAT_KINDS[kind]().to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    loaded = ours.Tokenizer.load(files.get)
    assert loaded is not None
    return loaded
