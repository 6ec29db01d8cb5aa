"""The offline Engine on the null device: calls, streams, threads, refusals, ends. Tokens are the
oracle's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle import predict

import runtime
from runtime.engine import Engine
from runtime.errors import EngineDead, InvalidRequest, UsageError
from runtime.request import Request, SamplingParams

GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_artifact: Path) -> Iterator[Engine]:
    with Engine(artifact=str(tiny_artifact), device="null", kv_tokens=4096) as made:
        yield made


def expected(engine: Engine, tokens: list[int], most: int = 6) -> list[int]:
    sampling = SamplingParams(temperature=0, max_new_tokens=most, ignore_eos=True)
    request = Request(id=0, tokens=tokens, sampling=sampling)
    return predict(request, vocab=engine.get_server_info()["capacity"]["vocab"]).tokens


def test_the_package_offers_it_lazily() -> None:
    assert runtime.Engine is Engine
    with pytest.raises(AttributeError):
        runtime.Motor  # noqa: B018


def test_one_prompt_one_object_many_a_list(engine: Engine) -> None:
    one = engine.generate(input_ids=[1, 2, 3], sampling_params=GREEDY)
    many = engine.generate(input_ids=[[1, 2, 3], [4, 5]], sampling_params=GREEDY)
    assert one["output_ids"] == expected(engine, [1, 2, 3])
    assert [o["output_ids"] for o in many] == [
        expected(engine, [1, 2, 3]),
        expected(engine, [4, 5]),
    ]
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 6}


def test_stream_is_cumulative_and_ends_with_the_whole(engine: Engine) -> None:
    outputs = list(engine.generate("The license", GREEDY, stream=True))
    whole = engine.generate("The license", GREEDY)
    lengths = [len(o["output_ids"]) for o in outputs]
    assert lengths == sorted(set(lengths)) and lengths[0] == 1
    assert outputs[-1]["output_ids"] == whole["output_ids"]
    assert outputs[-1]["text"] == whole["text"]


def test_stop_strings_end_the_request_in_the_engine(engine: Engine) -> None:
    long = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    text = engine.generate("The license", long)["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = engine.generate("The license", {**long, "stop": stop})
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stopped["text"] == text[: text.index(stop)]
    stats = engine.get_server_info()["stats"]
    assert stats["running"] == 0


async def test_async_calls_share_the_engine(engine: Engine) -> None:
    prompts = [[i + 1, 2, 3] for i in range(8)]
    got = await asyncio.gather(
        *(engine.async_generate(input_ids=p, sampling_params=GREEDY) for p in prompts)
    )
    assert [g["output_ids"] for g in got] == [expected(engine, p) for p in prompts]
    stream = await engine.async_generate(input_ids=[9], sampling_params=GREEDY, stream=True)
    last = [output async for output in stream][-1]
    assert last["output_ids"] == expected(engine, [9])


def test_threads_share_the_engine(engine: Engine) -> None:
    got: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        got[i] = engine.generate(input_ids=[i + 1], sampling_params=GREEDY)["output_ids"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: expected(engine, [i + 1]) for i in range(8)}


def test_a_stream_given_up_is_aborted(engine: Engine) -> None:
    before = engine.get_server_info()["stats"]["aborted"]
    stream = engine.generate(
        input_ids=[1], sampling_params={"max_new_tokens": 1000, "ignore_eos": True}, stream=True
    )
    next(stream)
    stream.close()
    stats = engine.get_server_info()["stats"]
    assert stats["aborted"] == before + 1
    assert stats["running"] == 0


def test_flush_cache(engine: Engine) -> None:
    engine.generate(input_ids=list(range(1, 60)), sampling_params=GREEDY)
    again = engine.generate(input_ids=list(range(1, 60)), sampling_params=GREEDY)
    assert again["meta_info"]["cached_tokens"] == 48
    assert engine.flush_cache()
    fresh = engine.generate(input_ids=list(range(1, 60)), sampling_params=GREEDY)
    assert fresh["meta_info"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"input_ids": []}, "empty"),
        ({"input_ids": [-1]}, "input_ids must be"),
        ({}, "Either text"),
        ({"prompt": "x", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"prompt": "x", "sampling_params": {"top_q": 1}}, "top_q"),
        ({"prompt": "x", "sampling_params": {"max_new_tokens": 10**6}}, "context length"),
        ({"prompt": "x", "image_data": "y"}, "image_data"),
    ],
    ids=str,
)
def test_wrong_calls_are_refused_and_harm_nobody(engine: Engine, call: dict, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        engine.generate(**call)
    assert engine.generate(input_ids=[3], sampling_params=GREEDY)["output_ids"] == expected(
        engine, [3]
    )


def test_unknown_and_wrong_options_are_refused(tiny_artifact: Path) -> None:
    with pytest.raises(UsageError, match="unknown option 'colour'"):
        Engine(artifact=str(tiny_artifact), colour="red")
    with pytest.raises(UsageError, match="threads"):
        Engine(artifact=str(tiny_artifact), threads="many")


def test_after_shutdown_and_after_a_fault_calls_raise(tiny_artifact: Path) -> None:
    engine = Engine(artifact=str(tiny_artifact), device="null", null_step_s=0.01)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineDead):
        engine.generate(input_ids=[1], sampling_params=GREEDY)
    engine = Engine(artifact=str(tiny_artifact), device="null", null_step_s=0.01)
    stream = engine.generate(
        input_ids=[1], sampling_params={"max_new_tokens": 1000, "ignore_eos": True}, stream=True
    )
    next(stream)
    engine._driver._loop.session.collect = lambda ticket: 1 / 0  # the device breaks
    with pytest.raises(EngineDead, match="division"):
        list(stream)
    with pytest.raises(EngineDead):
        engine.flush_cache()
