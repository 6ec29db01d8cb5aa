"""Text to token ids and back, over the artifact's tokenizer.json.

Comes in: the artifact's text files. Goes out: `Tokenizer`, used by the HTTP process and the offline
Engine. The incremental way back lives in detokenizer.py, which takes its vocabulary pieces from
here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import tokenizers

from runtime.errors import DamagedArtifact
from runtime.text.literal import LiteralEncoder

PIECE = 4096  # characters normalised at a time

ReadText = Callable[[str], bytes | None]


class _Head(msgspec.Struct):
    """The parts of tokenizer.json we look at ourselves; the vocabulary is skipped."""

    decoder: dict[str, Any] | None = None
    normalizer: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Marks spellings of control tokens inside user text, so that a chat prompt keeps them text:
    `mark` is inserted after the first character of each. `hit` says whether any was found, as it is
    written or as the tokenizer normalises it; without one the prompt is encoded as it is.
    """

    mark: str
    hit: bool


@dataclass(slots=True)
class Tokenizer:
    """Its results never change after `load`. Encoding is done by the library without the GIL, so
    it may run in a thread.
    """

    backend: tokenizers.Tokenizer
    config: dict[str, Any]
    decoder: str  # byte_level | sentencepiece | other
    special: dict[int, str]  # control tokens
    bos: str | None
    eos: str | None
    first: int | None  # token that starts every text
    last: int | None  # token that ends every text
    _special_ids: dict[str, int]
    _spellings: re.Pattern[str] | None
    _normalised: re.Pattern[str] | None  # the same without spaces; None: no other text becomes one
    _literal: LiteralEncoder | None = None
    _texts: dict[int, str] = field(default_factory=dict)
    _longest: int = 0

    @staticmethod
    def load(read: ReadText) -> Tokenizer | None:
        """None when the artifact carries no tokenizer (a model without a checkpoint)."""
        data = read("tokenizer.json")
        if data is None:
            return None
        try:
            head = msgspec.json.decode(data, type=_Head)
            backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:
            raise DamagedArtifact(
                f"text/tokenizer.json cannot be read: {error}; compile the model again"
            ) from error
        backend.no_truncation()
        backend.no_padding()
        config = msgspec.json.decode(read("tokenizer_config.json") or b"{}", type=dict)
        added = backend.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        spellings = _any_of(special.values())
        normalised = _any_of(map(_squeezed, special.values()))
        bos, eos = _spelling(config.get("bos_token")), _spelling(config.get("eos_token"))
        return Tokenizer(
            backend=backend,
            config=config,
            decoder=_decoder_kind(head.decoder),
            special=special,
            bos=bos,
            eos=eos,
            first=backend.token_to_id(bos) if bos and config.get("add_bos_token") else None,
            last=backend.token_to_id(eos) if eos and config.get("add_eos_token") else None,
            _special_ids={text: i for i, text in special.items()},
            _spellings=spellings,
            _normalised=normalised if _changes_spellings(head.normalizer) else None,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # encode_batch, not encode: it releases the GIL (tokenizers 0.23).
        batch = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        if add_special_tokens:  # those the post-processor in tokenizer.json has not put there
            if self.first is not None and ids[:1] != [self.first]:
                ids.insert(0, self.first)
            if self.last is not None and ids[-1:] != [self.last]:
                ids.append(self.last)
        return ids

    def encode_chat(self, prompt: str, guard: Guard) -> list[int]:
        """A rendered chat prompt: the template wrote its own control tokens, the user's marked
        spellings stay text.
        """
        if not guard.hit or self._spellings is None:
            return self.encode(prompt, add_special_tokens=False)
        parts: list[str | int] = []
        end = 0
        for match in self._spellings.finditer(prompt):
            parts += [
                prompt[end : match.start()].replace(guard.mark, ""),
                self._special_ids[match.group()],
            ]
            end = match.end()
        parts.append(prompt[end:].replace(guard.mark, ""))
        if self._literal is None:  # few servers ever need it
            added = self.backend.get_added_tokens_decoder()
            self._literal = LiteralEncoder(self.backend, {i: added[i] for i in self.special})
        return self._literal.encode(parts)

    def guard(self, texts: Iterable[str]) -> Guard:
        """A mark that occurs in none of `texts`. Takes as long as normalising them."""
        everything = "\0".join(texts)
        hit = self._spellings is not None and self._spellings.search(everything) is not None
        if not hit and self._normalised is not None:
            hit = self._normalised.search(self._normalise(everything)) is not None
        mark = next(chr(c) for c in range(0xE000, 0xF900) if not hit or chr(c) not in everything)
        return Guard(mark=mark, hit=hit)

    def marked(self, text: str, guard: Guard) -> str:
        if not guard.hit or self._spellings is None:
            return text
        return self._spellings.sub(
            lambda match: match.group()[0] + guard.mark + match.group()[1:], text
        )

    def _normalise(self, text: str) -> str:
        """As the model gets to see it, without spaces: in pieces, because the library holds the
        GIL, and what it puts before a text it puts before each."""
        normalise = self.backend.normalizer.normalize_str
        pieces = range(0, len(text), PIECE)
        return "".join(_squeezed(normalise(text[start : start + PIECE])) for start in pieces)

    def constants(self) -> dict[str, str]:
        """Spellings of the special tokens, under the names chat templates use."""
        named = {k: _spelling(v) for k, v in self.config.items() if k.endswith("_token")}
        return {name: text for name, text in named.items() if text is not None}

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token: int) -> str:
        """One token alone, as log-probability lists show it."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.decode([token], skip_special_tokens=False)
        return text

    def longest_token(self) -> int:
        """Most UTF-8 bytes of text one token can stand for; 0 when unknown (lossy tokenizers)."""
        if self._longest == 0 and self.decoder != "other":
            vocabulary = self.backend.get_vocab(with_added_tokens=True)
            self._longest = max(len(spelling.encode()) for spelling in vocabulary)
        return self._longest


def _any_of(spellings: Iterable[str]) -> re.Pattern[str] | None:
    either = "|".join(map(re.escape, sorted(filter(None, spellings), key=len, reverse=True)))
    return re.compile(either) if either else None


def _squeezed(text: str) -> str:
    return re.sub(r"[\s\u2581]+", "", text)


def _changes_spellings(normalizer: dict[str, Any] | None) -> bool:
    """Whether it may make a control token's spelling of another text (full-width letters)."""
    if normalizer is None:
        return False
    kind = normalizer["type"]
    if kind == "Sequence":
        return any(map(_changes_spellings, normalizer["normalizers"]))
    spaces = kind == "Replace" and normalizer["pattern"] == {"String": " "}
    return not (spaces or kind in ("NFC", "NFD", "Prepend", "Strip"))


def _spelling(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _decoder_kind(decoder: dict[str, Any] | None) -> str:
    if decoder is None:
        return "other"
    parts = decoder.get("decoders", [decoder])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        return "byte_level"
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] or kinds == ["Metaspace"]:
        return "sentencepiece"
    return "other"
