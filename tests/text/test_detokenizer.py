"""Incremental detokenizing against the library's own decode of everything at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import toy_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.text.detokenizer import REPLACEMENT, Detokenizers
from runtime.text.tokenizer import Tokenizer

TOKENIZERS = {kind: toy_tokenizers.load(kind) for kind in toy_tokenizers.KINDS}
DETOKENIZERS = {kind: Detokenizers(tokenizer) for kind, tokenizer in TOKENIZERS.items()}


def feed(kind: str, ids: list[int], cuts: list[int], skip: bool = True) -> tuple[str, list[str]]:
    """The whole text, and what was certain after every piece."""
    detokenizer = DETOKENIZERS[kind].new(skip_special_tokens=skip)
    bounds = [0, *sorted({c % (len(ids) + 1) for c in cuts}), len(ids)]
    text, told = "", []
    for start, end in pairwise(bounds):
        text += detokenizer.feed(ids[start:end])
        told.append(text)
    return text + detokenizer.flush(), told


def size(tokenizer: Tokenizer) -> int:
    return tokenizer.backend.get_vocab_size()


@pytest.mark.parametrize("kind", toy_tokenizers.KINDS)
def test_kind_is_recognised(kind):
    assert TOKENIZERS[kind].decoder == kind


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, size(TOKENIZERS["byte_level"]) + 3), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=40),
    skip=st.booleans(),
)
def test_byte_level_equals_decode_for_any_ids(ids, cuts, skip):
    want = TOKENIZERS["byte_level"].decode(ids, skip_special_tokens=skip)
    text, told = feed("byte_level", ids, cuts, skip)
    assert text == want
    assert all(want.startswith(part) for part in told)


TEXTS = st.text(
    st.one_of(
        st.sampled_from("the quick brown fox ß漢字🎉и "),
        st.characters(codec="utf-8", exclude_categories=("Cs",), exclude_characters="\u2581"),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=60))
def test_sentencepiece_equals_decode_of_text(text, cuts):
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("x" + text)
    whole, told = feed("sentencepiece", ids, cuts)
    # After a prompt the first space is real; decode() strips it from the start of a text.
    assert whole == " " + tokenizer.decode(ids) == " x" + text
    assert all(whole.startswith(part) for part in told)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_one_token_at_a_time_never_shows_half_a_character(kind):
    text = "x🎉漢👩‍👩‍👧é"
    ids = TOKENIZERS[kind].encode(text)
    whole, told = feed(kind, ids, list(range(len(ids))))
    assert whole.strip() == text
    assert not any(REPLACEMENT in part for part in told)


def test_sentencepiece_shows_one_replacement_per_bad_byte():
    backend = TOKENIZERS["sentencepiece"].backend
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in (0xE2, 0x82)]
    text, told = feed("sentencepiece", ids, [1])
    assert text == TOKENIZERS["sentencepiece"].decode(ids) == REPLACEMENT * 2
    assert told == ["", ""]


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["the", "quick", "brown", "fox", "lazy"]), min_size=1))
def test_fallback_decodes_word_pieces(words):
    tokenizer = TOKENIZERS["other"]
    ids = tokenizer.encode(" ".join(words))
    text, _ = feed("other", ids, list(range(len(ids))))
    assert text == tokenizer.decode(ids)


def test_control_tokens_are_skipped_only_when_asked():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>")
    assert feed("byte_level", ids, [])[0] == "hi"
    assert feed("byte_level", ids, [], skip=False)[0] == "<|im_start|>hi<|im_end|>"
