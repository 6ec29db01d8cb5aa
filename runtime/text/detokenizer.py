"""Token ids to text, a few ids at a time, never half a character.

Comes in: ids as the engine emits them. Goes out: the text that is certain. One detokenizer per
running sequence, made by `Detokenizers` (one per tokenizer), which caches the bytes of every
vocabulary piece seen.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    def feed(self, tokens: Sequence[int]) -> str: ...

    def flush(self) -> str:
        """What is left when no token follows: replacement characters for a cut-off one."""
        ...


class Detokenizers:
    """Piece tables of one tokenizer, with and without control tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown = _Pieces(tokenizer, skip=frozenset())
        self._skipping = _Pieces(tokenizer, skip=frozenset(tokenizer.special))

    def new(self, *, skip_special_tokens: bool) -> Detokenizer:
        if self._tokenizer.decoder == "other":
            return _WindowDetokenizer(self._tokenizer, skip_special_tokens)
        pieces = self._skipping if skip_special_tokens else self._shown
        # SentencePiece's byte fallback shows one replacement character per bad byte, byte-level
        # decoders one per bad sequence.
        errors = "replace" if self._tokenizer.decoder == "byte_level" else "headstart.each_byte"
        return _PieceDetokenizer(pieces, errors)

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text; of half a character, its bytes."""
        if self._tokenizer.decoder == "other":
            return self._tokenizer.token_text(token).encode()
        return self._shown[token]


class _Pieces(dict[int, bytes]):
    """Token id -> the bytes it stands for in running text; filled on first use."""

    def __init__(self, tokenizer: Tokenizer, *, skip: frozenset[int]) -> None:
        super().__init__()
        self._backend = tokenizer.backend
        self._byte_level = tokenizer.decoder == "byte_level"
        self._skip = skip

    def __missing__(self, token: int) -> bytes:
        spelling = self._backend.id_to_token(token)
        if spelling is None or token in self._skip:
            piece = b""
        elif self._byte_level:
            piece = _byte_level_bytes(spelling)
        elif len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
            piece = bytes.fromhex(spelling[3:5])
        else:
            piece = spelling.replace("\u2581", " ").encode()
        self[token] = piece
        return piece


class _PieceDetokenizer:
    __slots__ = ("_decode", "_piece")

    def __init__(self, pieces: _Pieces, errors: str) -> None:
        self._piece = pieces.__getitem__
        self._decode = codecs.getincrementaldecoder("utf-8")(errors).decode

    def feed(self, tokens: Sequence[int]) -> str:
        if len(tokens) == 1:
            return self._decode(self._piece(tokens[0]))
        return self._decode(b"".join(map(self._piece, tokens)))

    def flush(self) -> str:
        return self._decode(b"", True)


class _WindowDetokenizer:
    """For decoders that are no plain concatenation (WordPiece, CTC, …): decode a short window
    twice and take the difference.
    """

    __slots__ = ("_ids", "_prefix", "_read", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._prefix = 0  # window start
        self._read = 0  # ids before this one are already text

    def feed(self, tokens: Sequence[int]) -> str:
        self._ids += tokens
        before, after = self._texts()
        if after.endswith(REPLACEMENT):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        before, after = self._texts()
        self._prefix = self._read = len(self._ids)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode, ids = self._tokenizer.decode, self._ids
        before = decode(ids[self._prefix : self._read], skip_special_tokens=self._skip)
        return before, decode(ids[self._prefix :], skip_special_tokens=self._skip)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: a byte that is printable Latin-1 stands for itself, the
    others for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(spelling: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in spelling])
    except KeyError:  # an added token, written in plain text
        return spelling.encode()


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("headstart.each_byte", _each_byte)
