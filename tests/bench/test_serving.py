"""The serving benchmark against a fake server whose behaviour is known."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from bench_fake_server import FakeServer
from tokenizers import Tokenizer, models

from bench import serving
from bench.client import Target, ask
from bench.errors import BenchError, BenchUsage
from bench.workload import Prompt
from conf.bench_schema import Goodput, RandomDataset, ServingConfig
from conf.load import load


def config(url: str, **changes: object) -> ServingConfig:
    options: dict = {
        "url": url,
        "num_prompts": 12,
        "random": RandomDataset(input_len=5, output_len=8, range_ratio=1.0),
        "warmup_requests": 0,
        "progress": False,
        **changes,
    }
    return ServingConfig(**options)


@pytest.fixture
async def fake() -> AsyncIterator[FakeServer]:
    made = FakeServer()
    server = TestServer(made.app)
    await server.start_server()
    made.url = str(server.make_url(""))  # type: ignore[attr-defined]
    yield made
    await server.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("backend", ["native", "openai"])
async def test_counts(fake: FakeServer, backend: str, stream: bool) -> None:
    result = await serving.measure(config(fake.url, backend=backend, stream=stream))
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["total_output_tokens"] == 12 * 8
    assert result["total_input_tokens"] == 12 * (5 if backend == "native" else 7)
    assert result["artifact"] == "abc123"
    assert result["median_ttft_ms"] > 0
    if stream:
        assert result["median_itl_ms"] >= 1.5  # the fake sleeps 2 ms between tokens
        assert result["median_ttft_ms"] < result["median_e2e_latency_ms"]


async def test_native_body(fake: FakeServer) -> None:
    await serving.measure(config(fake.url, num_prompts=1, extra_body={"priority": 3}))
    assert len(fake.bodies[0].pop("input_ids")) == 5
    assert fake.bodies[0] == {
        "sampling_params": {
            "temperature": 0.0,
            "top_p": 1.0,
            "max_new_tokens": 8,
            "ignore_eos": True,
        },
        "stream": True,
        "priority": 3,
    }


async def test_chat_needs_text(fake: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="tokenizer="):
        await serving.measure(config(fake.url, backend="openai-chat", vocab=9))
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    chat = config(fake.url, backend="openai-chat", tokenizer=str(tmp_path))
    result = await serving.measure(chat)
    assert result["completed"] == 12 and result["total_output_tokens"] == 96
    assert result["model"] == "fake"
    assert set(fake.bodies[0]["messages"][0]["content"].split()) <= {"a", "b"}


async def test_failures_are_counted_and_named(fake: FakeServer) -> None:
    fake.fail_every = 3
    result = await serving.measure(config(fake.url, num_prompts=12, goodput=Goodput(e2el=60_000)))
    assert (result["completed"], result["failed"]) == (8, 4)
    assert result["failures"] == {
        "HTTP 503: queue is full": 1,
        "engine ended": 1,
        "the stream ended without [DONE]": 1,
        "aborted: too long": 1,
    }
    assert result["total_output_tokens"] == 8 * 8
    assert result["slo_attainment"] == pytest.approx(8 / 12)


async def test_max_concurrency(fake: FakeServer) -> None:
    result = await serving.measure(config(fake.url, max_concurrency=3))
    assert fake.most_running == 3 == result["max_concurrent_requests"]


async def test_without_a_rate_no_more_than_the_server_runs_at_once(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"internal_states": [{"capacity": {"max_seqs": 2}}]}
    assert serving.running_at_once(states) == 2
    assert serving.running_at_once(None) is None
    assert serving.running_at_once({"internal_states": [{"capacity": None}]}) is None
    monkeypatch.setattr(serving, "running_at_once", lambda info: 2)
    result = await serving.measure(config(fake.url))
    assert fake.most_running == 2 == result["max_concurrency"] and result["completed"] == 12
    result = await serving.measure(config(fake.url, request_rate=1e4))
    assert result["max_concurrency"] is None, "a rate is an arrival process: nothing bounds it"


async def test_refusals_come_with_a_remedy(fake: FakeServer) -> None:
    fake.fail_every = 3
    result = await serving.measure(config(fake.url))
    assert any("refused 1 requests" in w and "max_concurrency" in w for w in result["warnings"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"url": "localhost:30000"}, "url=localhost:30000: must start"),
        ({"dataset": "sharegpt-file"}, "dataset_path="),
        ({"dataset_path": "/nope.json"}, "dataset_path=/nope"),
        ({"backend": "openai-chat"}, "tokenizer="),
    ],
)
async def test_wrong_options_are_said_before_a_server_is_waited_for(
    changes: dict[str, object], said: str
) -> None:
    options = {"url": "http://127.0.0.1:1", **changes}
    with pytest.raises(BenchUsage, match=said):
        await serving.measure(config(**options))  # type: ignore[arg-type]


async def test_a_server_that_wants_a_key_is_named_as_such() -> None:
    async def guarded(request: web.Request) -> web.Response:
        return web.Response(status=200 if request.path == "/health" else 401)

    app = web.Application()
    app.router.add_get("/{path:.*}", guarded)
    async with TestServer(app) as server:
        with pytest.raises(BenchUsage, match=r"answered 401: give the server's api_key="):
            await serving.measure(config(str(server.make_url(""))))


async def test_coalesced_tokens_are_all_counted(fake: FakeServer) -> None:
    fake.per_message = 4
    async with aiohttp.ClientSession() as session:
        for backend in ("native", "openai"):
            target = Target(url=fake.url, backend=backend, model="fake")
            prompt = Prompt(tokens=(1, 2), output_len=8)
            timeline = await ask(session, target, target.body(prompt))
            assert [tokens for _, tokens in timeline.arrivals] == [4, 4]
            assert timeline.text == "x" * 8


async def test_a_dead_server_is_an_error_of_the_request() -> None:
    target = Target(url="http://127.0.0.1:1", backend="native")
    async with aiohttp.ClientSession() as session:
        body = target.body(Prompt(tokens=(1,), output_len=2))
        timeline = await ask(session, target, body)
    assert not timeline.ok and "127.0.0.1" in (timeline.error or "")


async def test_not_ready() -> None:
    with pytest.raises(BenchError, match="no server is ready"):
        await serving.measure(config("http://127.0.0.1:1", ready_timeout=0.0))


async def test_failed_warm_up_stops_the_run(fake: FakeServer) -> None:
    fake.fail_every = 1
    with pytest.raises(BenchError, match="queue is full"):
        await serving.measure(config(fake.url, warmup_requests=1))


async def test_output_details(fake: FakeServer) -> None:
    result = await serving.measure(config(fake.url, num_prompts=2, output_details=True))
    assert result["output_lens"] == [8, 8]
    assert [len(gaps) for gaps in result["itls"]] == [7, 7]
    json.dumps(result)


OWN = {
    "random": ["random.input_len=5"],
    "shared-prefix": ["shared_prefix.groups=2"],
    "sharegpt-file": ["dataset_path=/dev/null", "sharegpt.output_len=9"],
}


@pytest.mark.parametrize("dataset", OWN)
def test_options_of_other_datasets_are_refused(dataset: str) -> None:
    for owner, word in ((owner, word) for owner, words in OWN.items() for word in words):
        loaded = load(ServingConfig, "bench/serving", [f"dataset={dataset}", word])
        if owner == dataset:
            serving.check_effect(loaded.config, loaded.sources)
        else:
            said = f"^{word}: dataset={dataset} does not .* leave it out or take dataset={owner}$"
            with pytest.raises(BenchUsage, match=said):
                serving.check_effect(loaded.config, loaded.sources)
