"""The status policy: who gets 429, 500, 503 and 504, in which shape, on every route that works."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from serving import ENDLESS, Reply, ServerProcess, serving, starting, wait_until
from toy_artifact import write_artifact

from runtime.http.app import ROUTES, Route, Scope, build_app
from runtime.http.link import EngineLink
from runtime.http.stream import Job, StreamTrack
from runtime.manifest import EmbeddingInfo
from runtime.metrics import Memory, RequestMetrics
from runtime.request import Event, Finish, Request, SamplingParams
from runtime.text.sequence import Sequence

ONE = {"input_ids": [5], "sampling_params": ENDLESS}
COMPLETION = {"prompt": "the", "max_tokens": 900, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "ignore_eos": True}
LONG = {"input_ids": [5] * 1000}  # in steps of 16 tokens
# Bodies for every route that needs the engine, but the controls.
GENERATING: dict[str, list[dict[str, Any]]] = {
    "/generate": [ONE, ONE | {"input_ids": [[5], [6]]}, ONE | {"sampling_params": {"regex": "a+"}}],
    "/v1/completions": [COMPLETION, COMPLETION | {"n": 2}, COMPLETION | {"prompt": ["a", "b"]}],
    "/v1/chat/completions": [CHAT, CHAT | {"n": 2}],
}
EMBEDDING: dict[str, list[dict[str, Any]]] = {
    "/encode": [{"input_ids": [5]}, {"input_ids": [[5], [6]]}],
    "/v1/embeddings": [{"input": "the"}, {"input": [[5], [6]]}],
}
CONTROLS = {"/health_generate", "/flush_cache"}


def check(reply: Reply, status: int, message: str, kind: str) -> None:
    assert reply.status == status, reply.body
    assert reply.headers["Content-Type"].startswith("application/json")
    error = {"message": message, "type": kind, "param": None, "code": status}
    assert reply.json == {"object": "error", **error, "error": error}
    assert ("Retry-After" in reply.headers) == (status in (429, 503))


def post_and_leave_open(server: ServerProcess, path: str, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    sock = server.connect()
    sock.sendall(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return sock


@contextlib.contextmanager
def full(artifact: Path, path: str, body: dict[str, Any]) -> Iterator[ServerProcess]:
    """One request runs, one waits, and there is no room for a third."""
    options = ["limits.waiting_requests=1", "max_running=1", "max_step_tokens=16"]
    with serving(artifact, *options, "null_step_s=0.05") as server, contextlib.ExitStack() as held:

        def busy(running: int, waiting: int) -> bool:
            stats = server.info()["stats"]
            return stats and (stats["running"], stats["waiting"]) == (running, waiting)

        for waiting in (0, 1):
            held.enter_context(post_and_leave_open(server, path, body))
            wait_until(lambda waiting=waiting: busy(1, waiting))
        yield server


FULL = ("The request queue is full.", "rate_limit_error")


def test_the_bodies_here_are_for_every_route_that_works():
    works = {route.path for route in ROUTES if route.works}
    assert works == GENERATING.keys() | EMBEDDING.keys() | CONTROLS


def test_a_full_queue_is_429_on_every_generating_route(toy_artifact):
    with full(toy_artifact, "/generate", ONE) as server:
        for path, bodies in GENERATING.items():
            for body in bodies:
                for stream in (False, True):
                    check(server.post(path, body | {"stream": stream}), 429, *FULL)
        check(server.get("/health_generate"), 429, *FULL)
        assert server.get("/health").status == 200
        assert server.info()["in_flight"] == 2, "what was admitted of a batch went with it"


@pytest.fixture(scope="module")
def toy_embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    info = EmbeddingInfo(dim=8, pooling="last", normalise=True, whole=False)
    return write_artifact(tmp_path_factory.mktemp("embedder"), embedding=info)


def test_a_full_queue_is_429_on_every_embedding_route(toy_embedder):
    with full(toy_embedder, "/encode", LONG) as server:
        for path, bodies in EMBEDDING.items():
            for body in bodies:
                check(server.post(path, body), 429, *FULL)
        check(server.get("/health_generate"), 429, *FULL)


def test_a_call_that_no_queue_could_hold_is_not_told_to_try_again(toy_artifact):
    with serving(toy_artifact, "limits.waiting_requests=2", "max_running=1") as server:
        for body in (ONE | {"input_ids": [[5]] * 4}, ONE | {"sampling_params": {"n": 4}}):
            reply = server.post("/generate", body)
            assert reply.status == 400
            assert reply.message == (
                "prompts x n are 4, this server runs and queues 3 at once; send fewer or raise "
                "limits.waiting_requests."
            )
        short = {"max_new_tokens": 1}
        fits = {"input_ids": [[5]] * 3, "sampling_params": short}
        assert server.post("/generate", fits).status == 200


RAN = "Request running timeout reached."
WAITED = "Request waiting timeout reached."


def test_a_deadline_is_504_or_the_one_error_event_that_ends_a_stream(toy_artifact):
    with serving(toy_artifact, "limits.request_s=0.2", "null_step_s=0.02") as server:
        for path, (single, several, *_) in GENERATING.items():
            check(server.post(path, single), 504, RAN, "timeout_error")
            events = server.post(path, several | {"stream": True}).events
            failed = [event["error"] for event in events if "error" in event]
            assert failed == [events[-1].get("error")], events[-2:]
            assert (failed[0]["message"], failed[0]["code"]) == (RAN, 504)
            assert failed[0]["retryable"] is False


def test_waiting_too_long_is_504_and_ends_the_whole_stream(toy_artifact):
    limits = ["limits.queue_wait_s=0.4", "max_running=1", "null_step_s=0.02"]
    with serving(toy_artifact, *limits) as server:
        with server.open_stream(ONE):
            check(server.post("/generate", ONE), 504, WAITED, "timeout_error")
            check(server.post("/generate", ONE | {"stream": True}), 504, WAITED, "timeout_error")
        server.wait_idle()
        both = server.post("/generate", ONE | {"input_ids": [[5], [6]], "stream": True})
        events = both.events
        assert [i for i, event in enumerate(events) if "error" in event] == [len(events) - 1]
        assert {event["index"] for event in events[:-1]} == {0}, "the first ran meanwhile"
        assert events[-1]["error"]["message"] == WAITED
        server.wait_idle(3)  # 900 steps would take 18 s


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_server_that_starts_answers_503(toy_artifact):
    port = free_port()
    with starting(toy_artifact, f"port={port}") as server:
        server.port = port

        def hold() -> int:
            with contextlib.suppress(AssertionError, OSError):
                os.kill(pid := server.engine_pid(), signal.SIGSTOP)
                return pid
            return 0

        def answered() -> Reply | None:
            with contextlib.suppress(ConnectionError, TimeoutError):
                return server.get("/health", timeout=5)
            return None

        engine = wait_until(hold)
        try:
            down = "service_unavailable_error"
            check(wait_until(answered), 503, "The engine is not ready.", down)
            for route in ROUTES:
                if route.scope is not Scope.OPEN:
                    path = route.path.replace("{id}", "toy")
                    reply = server.request(route.methods[0], path, {})
                    check(reply, 503, "The engine is starting; try again.", down)
        finally:
            os.kill(engine, signal.SIGCONT)  # stopped, it would outlive the server
        server.wait_ready()
        assert server.get("/health").status == 200
        assert server.generate(input_ids=[5], sampling_params={"max_new_tokens": 1}).status == 200


async def test_our_bug_is_500_and_says_nothing_of_itself():
    async def bug(server: Any, request: web.Request) -> web.StreamResponse:
        raise KeyError("secret detail")

    config = SimpleNamespace(api_key=None, admin_api_key=None, host="127.0.0.1")
    metrics = RequestMetrics(Memory(weights=0, page=0))
    link = SimpleNamespace(capacity=object())
    fake = cast(Any, SimpleNamespace(config=config, metrics=metrics, link=link))
    route = Route(methods=("GET",), path="/bug", handler=bug, scope=Scope.API)
    async with (
        TestServer(build_app(fake, (route,))) as site,
        ClientSession() as session,
        session.get(site.make_url("/bug")) as reply,
    ):
        got = Reply(reply.status, dict(reply.headers), await reply.read())
    check(got, 500, "Internal error.", "internal_server_error")
    assert metrics.http_responses["/bug", 500] == 1


class Told:
    """A stream that keeps what it is told."""

    paused = False

    def __init__(self) -> None:
        self.tracks: list[StreamTrack] = []
        self.sent: list[bytes] = []
        self.failed: list[tuple[str, int]] = []

    def send(self, chunk: bytes) -> None:
        self.sent.append(chunk)

    def fail(self, message: str, status: int) -> None:
        self.failed.append((message, status))


class Broken:
    def chunk(self, seq: Sequence, final: bool) -> bytes | None:
        if final:
            raise ValueError("a bug in an encoder")
        return b"data: {}\n\n"


def sequence(number: int) -> Sequence:
    return Sequence(
        request=Request(id=number, tokens=[1], sampling=SamplingParams()),
        rid=str(number),
        index=number,
        tokenizer=None,
        detokenizer=None,
        stop=(),
        no_stop_trim=False,
        interval=1,
        text_in_logprobs=False,
        show_prompt_ids=False,
    )


async def test_a_bug_in_the_last_message_ends_the_answer_all_the_same():
    """The sequence had finished, but nobody was told: its client must not wait for its deadline."""
    link = EngineLink(cast(Any, None), cast(Any, SimpleNamespace(pid=1)), step_s=1.0)
    metrics = RequestMetrics(Memory(weights=0, page=0))
    job = Job(link, metrics, [sequence(1)], deadline_s=60.0)
    stream = Told()
    track = StreamTrack(job, job.sequences[0], cast(Any, stream), Broken())
    link._tell(track, Event(id=1, tokens=[4]))
    link._tell(track, Event(id=1, tokens=[4], finish=Finish(reason="length")))
    assert stream.sent == [b"data: {}\n\n"] and stream.failed == [("Internal error.", 500)]
    assert job.done.done() and job.error == ("Internal error.", 500)
    job.close()
