"""Grammars to matchers, by llguidance.

Comes in: tokenizer.json and a request's grammar. Goes out: a `Matcher`, which says of any sequence
of tokens which may come next. A compile is fast for what people write and bounded by `trial.py` for
the rest; a matcher's steps are bounded by LIMITS.
"""

from __future__ import annotations

import json
from typing import Any

import llguidance
from llguidance import LLMatcher as Matcher
from llguidance import LLTokenizer, StructTag

from runtime.request import Grammar

# Work of one mask (fuel, items) as llguidance has it: some 15 ms. States are 1 to 2 KiB each: so
# many are 64 MiB of a sequence's matcher.
LIMITS = llguidance.LLParserLimits(max_lexer_states=32768, verbose_errors=False)
# oneOf is read as anyOf, as other servers do. Whitespace is free but bounded: models that are lost
# write it for ever.
SCHEMA_DEFAULTS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}", "coerce_one_of": True}
ERROR_SIZE = 300  # characters of the library's text that reach the client


class GrammarError(Exception):
    """The grammar is wrong, in words for its author."""


def load_tokenizer(document: bytes, vocab: int, eos: tuple[int, ...]) -> LLTokenizer:
    """Takes half a second for a large vocabulary and does not release the GIL. Raises ValueError
    for a tokenizer whose tokens are no plain bytes."""
    ends = list(eos) or None
    return LLTokenizer(document.decode(), n_vocab=vocab, eos_token=ends)


def grammar_text(grammar: Grammar) -> str:
    """llguidance's form of it."""
    try:
        match grammar.kind:
            case "regex":
                return Matcher.grammar_from_regex(grammar.text)
            case "ebnf":
                return llguidance.grammar_from("ebnf", grammar.text)
            case "structural_tag":
                return _structural_tag(grammar.text)
            case _:
                if not grammar.text.lstrip().startswith("{"):
                    raise GrammarError("the schema must be a JSON object")
                return Matcher.grammar_from_json_schema(grammar.text, defaults=SCHEMA_DEFAULTS)
    except ValueError as error:
        raise GrammarError(shortened(str(error))) from None


def compile_matcher(tokenizer: LLTokenizer, text: str) -> Matcher:
    """Compiled, and its first mask computed once: what is lazy has been tried. Releases the GIL."""
    matcher = Matcher(tokenizer, text, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(failure(matcher))
    if matcher.is_stopped():
        raise GrammarError("it allows nothing")
    return matcher


def failure(matcher: Matcher) -> str:
    """Why a matcher does not go on."""
    text = matcher.get_error()
    return "it allows nothing" if text.startswith("NoExtension") else shortened(text)


def shortened(text: str) -> str:
    """The library's text on one line, without the grammar it repeats."""
    lines = [line.strip() for line in text.removesuffix("<non-verbose/>").splitlines()]
    if "regex parse error:" in lines[:1] or any("regex parse error" in line for line in lines):
        lines = [line for line in lines if line.startswith("error: ")] or lines
    line = next((line for line in lines if line), "it cannot be compiled")
    line = "".join(c if c.isprintable() else " " for c in line)
    return line if len(line) <= ERROR_SIZE else line[:ERROR_SIZE] + "..."


def _structural_tag(text: str) -> str:
    """SGLang's form: {"structures": [{"begin", "schema", "end"}], "triggers": [...]}; free text,
    and after each trigger one of the structures that begin with it."""
    try:
        tag = json.loads(text)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    shape = 'expected {"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}'
    if not isinstance(tag, dict) or not isinstance(tag.get("structures"), list):
        raise GrammarError(shape)
    triggers = tag.get("triggers")
    if not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers):
        raise GrammarError(shape)
    tags = []
    for structure in tag["structures"]:
        if not isinstance(structure, dict) or set(structure) - {"begin", "schema", "end"}:
            raise GrammarError(shape)
        begin, end = structure.get("begin"), structure.get("end")
        schema = structure.get("schema", {})
        if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, dict):
            raise GrammarError(shape)
        trigger = next((t for t in triggers if begin.startswith(t)), None)
        if trigger is None:
            raise GrammarError(f"no trigger begins {begin[:40]!a}")
        tags.append(StructTag(trigger=trigger, begin=begin, grammar=schema, end=end))
    if not tags:
        raise GrammarError(shape)
    return StructTag.to_grammar(tags, assume_special=False)
