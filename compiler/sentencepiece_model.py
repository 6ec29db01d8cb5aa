"""A SentencePiece model file (unigram or byte pairs) as a tokenizer.json that encodes and decodes
as the library does.

The file says everything: pieces with scores and types, normalisation, dummy prefix, byte fallback.
Called by `compiler.tokenizer_source`.
"""

from __future__ import annotations

import re
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from compiler.byte_pairs import merges

UNIGRAM, BPE = 1, 2  # TrainerSpec.model_type
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.type
SPACE = "▁"
END = r"\z"


class NoSentencePiece(ValueError):
    """Not a model of a kind we convert; the text says why."""


def sentencepiece_tokenizer(data: bytes, added: frozenset[str]) -> tuple[Tokenizer, list[str]]:
    """The tokenizer and its control tokens in id order. `added`: spellings of tokens the caller
    registers, user-defined pieces among them. Raises NoSentencePiece.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(data)
    except Exception as e:  # DecodeError; its class moves between protobuf's implementations
        raise NoSentencePiece("no SentencePiece model") from e
    pieces = [(p.piece, p.score, p.type) for p in proto.pieces]
    if not pieces:
        raise NoSentencePiece("no SentencePiece model")
    if any(kind == UNUSED for *_, kind in pieces):
        raise NoSentencePiece("a SentencePiece model with unused pieces")
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    user = sorted(
        (p for p, _, kind in pieces if kind == USER and p not in added), key=len, reverse=True
    )
    if trainer.model_type == BPE:
        model = _byte_pairs(pieces, trainer.unk_piece, trainer.byte_fallback, whole=bool(user))
    elif trainer.model_type == UNIGRAM:
        model = _unigram(pieces, trainer.unk_id, trainer.byte_fallback)
    else:
        raise NoSentencePiece(f"a SentencePiece model of type {trainer.model_type}")
    if trainer.treat_whitespace_as_suffix:
        raise NoSentencePiece("a SentencePiece model with spaces at the end of words")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(rules)
    cuts = []
    if user:  # always whole, and nothing merges across them
        pattern = Regex("|".join(map(re.escape, user)))
        cuts.append(pre_tokenizers.Split(pattern, behavior="isolated"))
    if trainer.model_type == UNIGRAM or user:
        # Added tokens are found in the text as it was written; what only becomes the spelling of
        # one when it is normalised (full-width letters) stays text in SentencePiece.
        spelled = {p for p, _, kind in pieces if kind in (UNKNOWN, CONTROL)} | added
        pattern = _inside(
            sorted(spelled), pieces, trainer.byte_fallback, trainer.model_type == UNIGRAM
        )
        cuts.append(pre_tokenizers.Split(pattern, behavior="merged_with_previous"))
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    parts: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if rules.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer, [p for p, _, kind in pieces if kind in (UNKNOWN, CONTROL)]


def _inside(
    spelled: list[str], pieces: list[tuple[str, float, int]], byte_fallback: bool, anywhere: bool
) -> Regex:
    """A place to cut in each spelling, so that the library's model, which holds every token as a
    piece, never sees a whole one. No piece of text goes across it where the spelling has such a
    place. `anywhere`: the model finds pieces within words; otherwise it takes whole words alone.
    """
    real = [piece for piece, _, kind in pieces if kind in (NORMAL, USER)]
    pairs = {piece[i : i + 2] for piece in real for i in range(len(piece) - 1)}
    known = {piece for piece in real if len(piece) == 1}

    def place(text: str) -> int:
        for i in range(1, len(text)):
            # Two unknown characters are one unknown piece, unless they are bytes.
            apart = byte_fallback or text[i - 1] in known or text[i] in known
            if text[i - 1 : i + 1] not in pairs and apart:
                return i
        return 1

    cuts = [(text[: place(text)], text[place(text) :]) for text in spelled if len(text) > 1]
    parts = [
        f"{re.escape(head)}(?={re.escape(tail)}{'' if anywhere else END})" for head, tail in cuts
    ]
    if byte_fallback:  # a written-out byte piece
        parts.append(f"<(?=0x[0-9A-F]{{2}}>{'' if anywhere else END})")
    either = "|".join(parts)
    return Regex(either if anywhere else rf"\A(?:{either})")


def _byte_pairs(
    pieces: list[tuple[str, float, int]], unknown: str, byte_fallback: bool, *, whole: bool
) -> models.Model:
    normal = [(-score, i, piece) for i, (piece, score, kind) in enumerate(pieces) if kind == NORMAL]
    return models.BPE(
        vocab={piece: i for i, (piece, *_) in enumerate(pieces)},
        merges=merges(piece for *_, piece in sorted(normal)),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=byte_fallback,
        ignore_merges=whole,
    )


def _unigram(
    pieces: list[tuple[str, float, int]], unknown: int, byte_fallback: bool
) -> models.Model:
    """Pieces that stand for no text of their own get a score below any sum of real ones."""
    real = [score for _, score, kind in pieces if kind == NORMAL]
    never = min(real, default=0.0) - 100.0
    scores = {NORMAL: None, USER: 0.0}
    vocab = [
        (piece, own if (own := scores.get(kind, never)) is not None else score)
        for piece, score, kind in pieces
    ]
    return models.Unigram(vocab, unknown, byte_fallback)


def _normalizer(rules: Any) -> normalizers.Normalizer:
    """In SentencePiece's order: character map, extra spaces, dummy prefix, visible spaces."""
    parts: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        if rules.name.startswith("nmt"):
            # Both become spaces; the library would take the two, one grapheme, for one.
            parts.append(normalizers.Replace("\r\n", "\n\n"))
        parts.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        parts.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        parts.append(normalizers.Replace(Regex(" {2,}"), " "))
    if rules.add_dummy_prefix:
        parts.append(normalizers.Prepend(SPACE))
    if rules.escape_whitespaces:
        parts.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(parts)
