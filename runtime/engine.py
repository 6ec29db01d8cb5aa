"""The engine without a server: `Engine(artifact).generate(prompts, sampling_params)`.

Comes in: prompts and parameters as `/generate` takes them. Goes out: the objects `/generate`
answers with, made by the same scheduler, device and text layer. The engine loop runs in one
background thread; every method may be called from any thread.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

import msgspec

from conf.schema import LimitsConfig
from runtime.answer import Answer, Output
from runtime.artifact import Artifact
from runtime.core.driver import Driver
from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.device.base import open_session
from runtime.errors import EngineDead, UsageError
from runtime.grammar.client import grammars_of
from runtime.request import Event
from runtime.text.call import Call
from runtime.text.encode import embedding_of, encoded, read_encode
from runtime.text.generate import read_generate
from runtime.text.model import TextModel, tokenize
from runtime.text.sequence import Sequence
from runtime.text.tokenizer import Tokenizer

NO_LIMIT = 1 << 40
# One caller who owns the machine: the limits that protect a server from its clients are off unless
# asked for.
OFFLINE: dict[str, Any] = {
    "waiting_requests": NO_LIMIT,
    "waiting_tokens": NO_LIMIT,
    "queue_wait_s": None,
    "request_s": None,
}


class Engine:
    """`options`: those of EngineOptions (threads, kv_tokens, max_running, max_step_tokens, policy,
    overlap, prefix_cache, device, …).
    """

    def __init__(self, artifact: str, **options: Any) -> None:
        self.options = read_options(str(artifact), options)
        self._artifact = Artifact.open(self.options.artifact)
        manifest = self._artifact.manifest
        session = open_session(
            self._artifact,
            device=self.options.device,
            threads=self.options.threads,
            gpu=self.options.gpu,
            kv_tokens=self.options.kv_tokens,
            trust=self.options.trust_artifact,
            null_step_s=self.options.null_step_s,
        )
        loop = EngineLoop(
            session,
            self.options,
            eos=manifest.model.eos_token_ids,
            grammars=grammars_of(self._artifact, session.capacity.slots),
        )
        self._capacity = session.capacity
        self._model = TextModel.make(
            manifest.name,
            Tokenizer.load(self._artifact.text),
            context=manifest.model.context,
            vocab=manifest.model.vocab,
            limits=LimitsConfig(prompts_per_request=NO_LIMIT),
            embedding=manifest.model.embedding,
        ).fitted(session.capacity.pages * session.capacity.page_size)
        self._driver = Driver(loop)

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        return_logprob: bool | list[bool] = False,
        logprob_start_len: int | list[int] = -1,
        top_logprobs_num: int | list[int] = 0,
        stream: bool = False,
        **more: Any,
    ) -> Any:
        """One object for one prompt, a list for a list or n > 1; with `stream` an iterator of
        cumulative objects. `more`: any other field of a `/generate` body.
        """
        body = {
            "text": prompt,
            "sampling_params": sampling_params,
            "input_ids": input_ids,
            "return_logprob": return_logprob,
            "logprob_start_len": logprob_start_len,
            "top_logprobs_num": top_logprobs_num,
            "stream": stream,
            **more,
        }
        call, sequences = self._read(body)
        news: queue.SimpleQueue[list[Event] | EngineDead] = queue.SimpleQueue()
        if call.stream:
            return self._stream(call, sequences, news)
        answer = Answer(call, sequences)
        with self._running(sequences, news.put, live=answer.live):
            while answer.open:
                self._driver.abort(answer.feed(news.get()))
        return answer.result()

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        return_logprob: bool | list[bool] = False,
        logprob_start_len: int | list[int] = -1,
        top_logprobs_num: int | list[int] = 0,
        stream: bool = False,
        **more: Any,
    ) -> Any:
        """As `generate`, for an event loop; cancelling it aborts the requests. With `stream` an
        asynchronous iterator.
        """
        body = {
            "text": prompt,
            "sampling_params": sampling_params,
            "input_ids": input_ids,
            "return_logprob": return_logprob,
            "logprob_start_len": logprob_start_len,
            "top_logprobs_num": top_logprobs_num,
            "stream": stream,
            **more,
        }
        call, sequences = await asyncio.to_thread(self._read, body)
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[list[Event] | EngineDead] = asyncio.Queue()

        def deliver(batch: list[Event] | EngineDead) -> None:
            loop.call_soon_threadsafe(news.put_nowait, batch)

        if call.stream:
            return self._async_stream(call, sequences, deliver, news)
        answer = Answer(call, sequences)
        with self._running(sequences, deliver, live=answer.live):
            while answer.open:
                self._driver.abort(answer.feed(await news.get()))
        return answer.result()

    def encode(
        self,
        prompt: str | list[str] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        dimensions: int | None = None,
        **more: Any,
    ) -> Any:
        """The `/encode` object of one prompt, a list of them for a list: `embedding` is a list of
        floats. `more`: any other field of an `/encode` body.
        """
        body = {"text": prompt, "input_ids": input_ids, "dimensions": dimensions, **more}
        call, sequences, cut = self._read_encode(body)
        news: queue.SimpleQueue[list[Event] | EngineDead] = queue.SimpleQueue()
        answer = Answer(call, sequences)
        with self._running(sequences, news.put, live=False):
            while answer.open:
                self._driver.abort(answer.feed(news.get()))
        return self._vectors(answer, cut)

    async def async_encode(
        self,
        prompt: str | list[str] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        dimensions: int | None = None,
        **more: Any,
    ) -> Any:
        """As `encode`, for an event loop; cancelling it aborts the requests."""
        body = {"text": prompt, "input_ids": input_ids, "dimensions": dimensions, **more}
        call, sequences, cut = await asyncio.to_thread(self._read_encode, body)
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[list[Event] | EngineDead] = asyncio.Queue()

        def deliver(batch: list[Event] | EngineDead) -> None:
            loop.call_soon_threadsafe(news.put_nowait, batch)

        answer = Answer(call, sequences)
        with self._running(sequences, deliver, live=False):
            while answer.open:
                self._driver.abort(answer.feed(await news.get()))
        return self._vectors(answer, cut)

    def flush_cache(self) -> bool:
        """Forgets cached prefixes; False while requests run on them."""
        return self._driver.control("flush_cache").ok

    def get_server_info(self) -> dict[str, Any]:
        """Options, sizes and counters."""
        stats = self._driver.control("stats").stats
        return {
            **msgspec.to_builtins(self.options),
            "artifact_digest": self._artifact.digest,
            "model": self._artifact.manifest.name,
            "capacity": msgspec.to_builtins(self._capacity),
            "stats": msgspec.structs.asdict(stats) if stats else None,
        }

    def shutdown(self) -> None:
        """Ends the engine; requests in flight raise EngineDead. May be called twice."""
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    # --- inside ---------------------------------------------------------------------------------

    def _read(self, body: dict[str, Any]) -> tuple[Call, list[Sequence]]:
        call = read_generate(body, self._model)
        tokens = [tokenize(self._model, prompt.source) for prompt in call.prompts]
        return call, call.build(self._model, tokens)

    def _read_encode(self, body: dict[str, Any]) -> tuple[Call, list[Sequence], int | None]:
        call, dimensions = read_encode(body, self._model)
        tokens = [tokenize(self._model, prompt.source) for prompt in call.prompts]
        return call, call.build(self._model, tokens), dimensions

    def _vectors(self, answer: Answer, dimensions: int | None) -> Output | list[Output]:
        info = embedding_of(self._model)
        return answer.result(lambda seq: encoded(seq, info, dimensions))

    def _running(
        self,
        sequences: list[Sequence],
        deliver: Callable[[list[Event] | EngineDead], None],
        *,
        live: bool,
    ) -> Running:
        return Running(self._driver, sequences, deliver, live=live)

    def _stream(
        self,
        call: Call,
        sequences: list[Sequence],
        news: queue.SimpleQueue[list[Event] | EngineDead],
    ) -> Iterator[Output]:
        answer = Answer(call, sequences)
        with self._running(sequences, news.put, live=True):
            while answer.open:
                self._driver.abort(answer.feed(news.get()))
                yield from answer.told()

    async def _async_stream(
        self,
        call: Call,
        sequences: list[Sequence],
        deliver: Callable[[list[Event] | EngineDead], None],
        news: asyncio.Queue[list[Event] | EngineDead],
    ) -> AsyncIterator[Output]:
        answer = Answer(call, sequences)
        with self._running(sequences, deliver, live=True):
            while answer.open:
                self._driver.abort(answer.feed(await news.get()))
                for output in answer.told():
                    yield output


class Running:
    """Submits on entry; whatever still runs on exit has lost its reader and is aborted."""

    def __init__(
        self,
        driver: Driver,
        sequences: list[Sequence],
        deliver: Callable[[list[Event] | EngineDead], None],
        *,
        live: bool,
    ) -> None:
        self._driver = driver
        self._sequences = sequences
        self._deliver = deliver
        self._live = live

    def __enter__(self) -> None:
        requests = [seq.request for seq in self._sequences]
        self._driver.submit(requests, self._deliver, live=self._live)

    def __exit__(self, *_: object) -> None:
        self._driver.abort([seq.request.id for seq in self._sequences if seq.finish is None])


def read_options(artifact: str, options: dict[str, Any]) -> EngineOptions:
    valid = set(EngineOptions.__struct_fields__) - {"artifact"}
    if unknown := sorted(set(options) - valid):
        raise UsageError(
            f"Engine: unknown option {unknown[0]!r}; valid are {', '.join(sorted(valid))}"
        )
    try:
        return msgspec.convert({**OFFLINE, **options, "artifact": artifact}, EngineOptions)
    except msgspec.ValidationError as error:
        raise UsageError(f"Engine: {error}") from None
