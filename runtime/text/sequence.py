"""One output being generated, as its client sees it: text, ids, log-probabilities, finish.

Comes in: the engine's `Event`s of one request. Goes out: newly visible text, and SGLang's response
object. Made by generate.py; one per engine request.
"""

from __future__ import annotations

import time
from typing import Any

from runtime.request import Event, Request, TopLogprobs
from runtime.text.detokenizer import Detokenizer
from runtime.text.stop import StopStrings
from runtime.text.tokenizer import Tokenizer

Triple = list[Any]  # [logprob | None, token id, text | None]


class Sequence:
    """`feed` every event, in order; it returns the text that became visible. Once `finish` is
    set nothing changes any more.
    """

    __slots__ = (
        "_detokenizer",
        "_no_stop_trim",
        "_stop",
        "_text_in_logprobs",
        "_tokenizer",
        "cached_tokens",
        "created",
        "embedding",
        "error",
        "finish",
        "finished_at",
        "first_token_at",
        "ids",
        "index",
        "interval",
        "last_token_at",
        "logprobs",
        "prompt_logprobs",
        "prompt_top",
        "request",
        "retractions",
        "rid",
        "show_prompt_ids",
        "text",
        "top",
    )

    def __init__(
        self,
        *,
        request: Request,
        rid: str,
        index: int,
        tokenizer: Tokenizer | None,
        detokenizer: Detokenizer | None,
        stop: tuple[str, ...],
        no_stop_trim: bool,
        interval: int,
        text_in_logprobs: bool,
        show_prompt_ids: bool,
    ) -> None:
        self.request = request
        self.rid = rid
        self.index = index
        self.interval = interval  # tokens between messages of a stream
        self.show_prompt_ids = show_prompt_ids
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop, keep_match=no_stop_trim) if stop and detokenizer else None
        self._no_stop_trim = no_stop_trim
        self._text_in_logprobs = text_in_logprobs
        self.text = ""
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[TopLogprobs] = []
        self.prompt_logprobs: list[float | None] = []
        self.prompt_top: list[TopLogprobs | None] = []
        self.embedding = b""  # float32 numbers, of an embedding model
        self.cached_tokens = 0
        self.retractions = 0
        self.finish: dict[str, Any] | None = None
        self.error: tuple[str, int] | None = None  # message and status, if it did not end by itself
        self.created = time.perf_counter()
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.finished_at = 0.0

    @property
    def stopped_by_text(self) -> bool:
        """Ended here by a stop string: the engine has to be told."""
        return self._stop is not None and self._stop.matched is not None

    @property
    def has_text(self) -> bool:
        return self._detokenizer is not None

    @property
    def holding(self) -> bool:
        """Text is held back because it may become a stop string."""
        return self._stop is not None and self._stop.holding

    def feed(self, event: Event) -> str:
        if self.finish is not None:
            return ""  # a stop string ended it; the engine had not heard yet
        if event.cached_tokens:
            self.cached_tokens = event.cached_tokens
        if event.retractions:
            self.retractions = event.retractions
        if event.prompt_logprobs:
            self.prompt_logprobs += event.prompt_logprobs
            self.prompt_top += event.prompt_top_logprobs
        if event.embedding:
            self.embedding = event.embedding
        tokens = event.tokens
        done = event.finish
        if self.request.logprobs:
            self.logprobs += event.logprobs
            self.top += event.top_logprobs
        visible = tokens
        if done is not None and done.matched is not None and not self._no_stop_trim:
            visible = tokens[:-1]
        if self._detokenizer is None:
            self.ids += tokens
            text = ""
        elif self._stop is not None:
            text = self._feed_stop(tokens, len(visible))
        else:
            self.ids += tokens
            text = self._detokenizer.feed(visible)
        if done is not None and self.finish is None:
            text += self._end(event)
        if text:
            self.text += text
        return text

    def fail(self, message: str, status: int) -> None:
        """It cannot be answered, whatever was known of it."""
        self.error = (message, status)
        self.finish = _abort(message, status)
        self.finished_at = time.perf_counter()

    def response(self) -> dict[str, Any]:
        """SGLang's object, cumulative from the start."""
        out: dict[str, Any] = {} if self._detokenizer is None else {"text": self.text}
        out["output_ids"] = self.ids
        out["meta_info"] = self.meta_info()
        if self.show_prompt_ids:
            out["prompt_token_ids"] = self.request.tokens
        return out

    def meta_info(self) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": self.finish,
            "prompt_tokens": len(self.request.tokens),
            "weight_version": "default",
            "num_retractions": self.retractions,
            "completion_tokens": len(self.ids),
            "cached_tokens": self.cached_tokens,
            "reasoning_tokens": 0,
        }
        if self.request.logprobs:
            meta |= self._logprob_info()
        if self.finish is not None:
            meta["e2e_latency"] = self.finished_at - self.created
        return meta

    def _feed_stop(self, tokens: list[int], visible: int) -> str:
        """One id at a time: the ids end at the one that completes a stop string."""
        assert self._stop is not None and self._detokenizer is not None
        shown = []
        for i, token in enumerate(tokens):
            self.ids.append(token)
            if i >= visible:
                break
            shown.append(self._stop.feed(self._detokenizer.feed((token,))))
            if self._stop.matched is not None:
                self._match()
                break
        return "".join(shown)

    def _match(self) -> None:
        assert self._stop is not None
        del self.logprobs[len(self.ids) :]
        del self.top[len(self.ids) :]
        self.finish = {"type": "stop", "matched": self._stop.matched}
        self.finished_at = time.perf_counter()

    def _end(self, event: Event) -> str:
        done = event.finish
        assert done is not None
        rest = self._detokenizer.flush() if self._detokenizer else ""
        if self._stop is not None:
            rest = self._stop.feed(rest) + self._stop.flush()
        if self._stop is not None and self._stop.matched is not None:
            self._match()
            return rest
        if done.reason == "stop":
            self.finish = {"type": "stop", "matched": done.matched}
        elif done.reason == "length":
            self.finish = {"type": "length", "length": len(self.ids)}
        else:
            self.finish = _abort(done.message or "Aborted", done.status)
            if done.status is not None:
                self.error = (done.message or "Aborted", done.status)
        self.finished_at = time.perf_counter()
        return rest

    def _logprob_info(self) -> dict[str, Any]:
        start = self.request.prompt_logprobs_from
        prompt = self.request.tokens[start:] if start >= 0 else []
        wants_top = self.request.top_logprobs > 0
        return {
            "input_token_logprobs": [
                self._triple(p, t) for p, t in zip(self.prompt_logprobs, prompt, strict=False)
            ],
            "output_token_logprobs": [
                self._triple(p, t) for p, t in zip(self.logprobs, self.ids, strict=False)
            ],
            "output_token_logprobs_length": len(self.logprobs),
            "input_top_logprobs": [self._tops(t) for t in self.prompt_top] if wants_top else [],
            "output_top_logprobs": [self._tops(t) for t in self.top] if wants_top else [],
            "input_token_ids_logprobs": [],
            "output_token_ids_logprobs": [],
        }

    def _triple(self, logprob: float | None, token: int) -> Triple:
        text = None
        if self._text_in_logprobs and self._tokenizer is not None:
            text = self._tokenizer.token_text(token)
        return [logprob, token, text]

    def _tops(self, top: TopLogprobs | None) -> list[Triple] | None:
        return None if not top else [self._triple(p, t) for p, t in top]


def _abort(message: str, status: int | None) -> dict[str, Any]:
    return {"type": "abort", "message": message, "status_code": status, "err_type": None}
