"""Text to token ids where only chosen places are control tokens.

Comes in: a tokenizer backend. Goes out: `LiteralEncoder`, which tokenizer.py uses for chat prompts
in which a user spelled a control token.
"""

from __future__ import annotations

import re
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers


class LiteralEncoder:
    """A second backend that knows no control token, so its memory is that of the first. The whole
    text is encoded at once, because what a tokenizer does at the start of a text (sentencepiece's
    dummy prefix) must not happen again within it. The chosen places are stand-ins: added tokens
    nobody can spell, because their spelling is drawn when the encoder is made. Each strips the
    spaces its control token would.
    """

    def __init__(self, backend: Tokenizer, special: Mapping[int, AddedToken]) -> None:
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True  # as text: only other added tokens are found
        nonce = secrets.token_hex(16)
        self._stands = {
            token: f"<{nonce}:{added.lstrip:d}{added.rstrip:d}>" for token, added in special.items()
        }
        self._backend.add_tokens(
            [
                AddedToken(f"<{nonce}:{left:d}{right:d}>", lstrip=left, rstrip=right, **PLAIN)
                for left in (False, True)
                for right in (False, True)
            ]
        )
        self._stand_ids = {self._backend.token_to_id(text) for text in self._stands.values()}
        # A model may hold control tokens as pieces (a unigram vocabulary, byte pairs that take
        # whole words). Cut last, behind normalization, it never sees a whole spelling.
        cut = pre_tokenizers.Split(
            Regex(_first_characters(added.content for added in special.values())),
            behavior="merged_with_previous",
        )
        own = self._backend.pre_tokenizer
        self._backend.pre_tokenizer = pre_tokenizers.Sequence([own, cut] if own else [cut])

    def encode(self, parts: Iterable[str | int]) -> list[int]:
        """`parts`: text, and ids of control tokens."""
        parts = list(parts)
        text = "".join(part if isinstance(part, str) else self._stands[part] for part in parts)
        controls = iter([part for part in parts if isinstance(part, int)])
        # encode_batch, not encode: it releases the GIL (tokenizers 0.23).
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [next(controls) if token in self._stand_ids else token for token in ids]


PLAIN = {"special": False, "normalized": False, "single_word": False}


def _first_characters(spellings: Iterable[str]) -> str:
    """Pattern of the first character of each spelling, where the rest follows."""
    rests: defaultdict[str, list[str]] = defaultdict(list)
    for spelling in spellings:
        rests[spelling[0]].append(re.escape(spelling[1:]))
    return "|".join(
        f"{re.escape(first)}(?={'|'.join(after)})" for first, after in sorted(rests.items())
    )
