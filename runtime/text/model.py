"""What the text layer knows of the served model, and prompts to token ids.

Comes in: the artifact's facts and tokenizer. Goes out: `TextModel`, which every request is read
against, and checked token ids. Used by generate.py, call.py and the routes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from conf.schema import LimitsConfig
from runtime.errors import InvalidRequest
from runtime.manifest import EmbeddingInfo
from runtime.text.detokenizer import Detokenizers
from runtime.text.schema import show
from runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """What the text layer knows of the served model. `tokenizer` None: token ids in, token ids
    out. `room`: most tokens one sequence can have, by context and KV pool. `embedding`: of a model
    that gives vectors instead of text.
    """

    name: str
    tokenizer: Tokenizer | None
    detokenizers: Detokenizers | None
    context: int
    room: int
    vocab: int
    limits: LimitsConfig
    embedding: EmbeddingInfo | None
    stream_interval: int = 1

    def fitted(self, kv_tokens: int) -> TextModel:
        """The same, once the engine has told the size of its KV pool."""
        return replace(self, room=min(self.context, kv_tokens))

    @staticmethod
    def make(
        name: str,
        tokenizer: Tokenizer | None,
        *,
        context: int,
        vocab: int,
        limits: LimitsConfig,
        embedding: EmbeddingInfo | None = None,
        stream_interval: int = 1,
    ) -> TextModel:
        return TextModel(
            name=name,
            tokenizer=tokenizer,
            detokenizers=Detokenizers(tokenizer) if tokenizer else None,
            context=context,
            room=context,
            vocab=vocab,
            limits=limits,
            embedding=embedding,
            stream_interval=stream_interval,
        )


def tokenize(model: TextModel, source: str | list[int]) -> list[int]:
    """A prompt's ids, checked. Slow for long text: callers with an event loop run it in a
    thread.
    """
    if isinstance(source, list):
        check_ids(source, model.vocab)
        return source
    if model.tokenizer is None:
        raise InvalidRequest("This model has no tokenizer; send input_ids.", param="text")
    if prompt_too_long(source, model):
        raise InvalidRequest(
            f"The input ({len(source)} characters) is longer than the model's context length "
            f"({model.context} tokens).",
            param="text",
        )
    return model.tokenizer.encode(source)


def check_ids(ids: list[int], vocab: int, param: str = "input_ids") -> None:
    if min(ids) < 0 or max(ids) >= vocab:
        bad = next(i for i in ids if not 0 <= i < vocab)
        raise InvalidRequest(f"{param} must be in [0, {vocab - 1}], got {show(bad)}.", param=param)


def prompt_too_long(text: str, model: TextModel) -> bool:
    """Known without tokenizing: more bytes than the context's worth of the longest token. Cheap,
    so it comes first.
    """
    size = len(text)
    if model.tokenizer is None or size <= 16 * model.context:
        return False
    longest = model.tokenizer.longest_token()
    return longest > 0 and size > longest * model.context
