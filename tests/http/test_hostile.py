"""Broken, slow or hostile clients: an answer in our shape, never a 5xx, never an echo."""

from __future__ import annotations

import gzip
import json
import socket
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import ServerProcess, serving, wait_until

JSON = b"Content-Type: application/json\r\n"
MARK = "qzx7marker"  # must not come back


def raw(server: ServerProcess, data: bytes, timeout: float = 15) -> bytes:
    """Everything the server says until it closes."""
    with server.connect() as sock:
        sock.settimeout(timeout)
        sock.sendall(data)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
        return answer


def check_error(answer: bytes, *statuses: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in statuses, answer[:300]
    assert json.loads(body)["error"]["code"] in statuses
    assert MARK.encode() not in answer


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /%s HTTP/1.1\r\nHost: localhost\r\nBad Header %s: 1\r\n\r\n", 400),
        (b"%s\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-%s: 1\r\n" * 70 + b"\r\n", 400),
        (b"GET /%s" + b"x" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: %s" + b"x" * 9000 + b"\r\n\r\n", 431),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\nX: %s\r\n\r\n", 400),
        (
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\nX: %s\r\n\r\nabc",
            400,
        ),
        (
            b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nExpect: %s\r\n\r\n",
            417,
        ),
    ],
    ids=[
        "header",
        "noise",
        "many headers",
        "long line",
        "long header",
        "length",
        "smuggle",
        "expect",
    ],
)
def test_malformed_heads(server: ServerProcess, head: bytes, status: int):
    check_error(raw(server, head.replace(b"%s", MARK.encode())), status)


def test_a_probe_without_a_host_is_answered(server: ServerProcess):
    """HTTP/1.0, as load balancers probe; HTTP/1.1 needs the header."""
    assert b"200 OK" in raw(server, b"GET /health HTTP/1.0\r\n\r\n")
    check_error(raw(server, b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n"), 421)
    check_error(raw(server, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"), 400)


def test_headers_too_large_in_sum(server: ServerProcess):
    many = b"".join(b"X-%d: %b\r\n" % (i, b"v" * 4000) for i in range(12))
    answer = raw(
        server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + many + b"\r\n"
    )
    check_error(answer, 431)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 100_000, 400),
        (b'{"text":"a","temperature":NaN}', 400),
        (b'{"text":"a","sampling_params":{"temperature":1e999}}', 400),
        (b'{"text":"a","sampling_params":{"temperature":Infinity}}', 400),
        (b'{"text":"a","text":"b"}', 400),
        (b'{"text":"a","te\\u0078t":"b"}', 400),
        (b'{"text":"\\ud800"}', 400),
        (b'{"text":"\xff\xfe"}', 400),
        ('{"text":"a"}'.encode("utf-16"), 400),
        (b'\xef\xbb\xbf{"text":"a"}', 400),
        (b'{"text":"a","rid":' + b"1" * 5000 + b"}", 400),
        (
            json.dumps(
                {"text": "a", "sampling_params": {f"k{i}": 1 for i in range(5000)}}
            ).encode(),
            400,
        ),
        (b"[" + b"[]," * 70_000 + b"[]]", 400),
        (b'{"text":"' + b'\\"' * 400_000, 400),
        (b'["",' * 3 + b'"",' * 150_000 + b"1]]]", 400),
        (b'{"text":"' + b"a" * (2 << 20) + b'"}', 413),
    ],
)
def test_malformed_bodies(server: ServerProcess, body: bytes, status: int):
    start = time.monotonic()
    for path in (
        "/generate",
        "/v1/completions",
        "/v1/chat/completions",
        "/abort_request",
        "/tokenize",
    ):
        reply = server.post(path, body)
        assert reply.status == status, (path, reply.body)
        assert reply.json["error"]["code"] == status
    assert time.monotonic() - start < 10


def test_media_types(server: ServerProcess):
    body = json.dumps({"text": "a", "sampling_params": {"max_new_tokens": 1}}).encode()
    reply = server.post("/generate", gzip.compress(body), headers={"Content-Encoding": "gzip"})
    assert reply.status == 415
    reply = server.post("/generate", body, headers={"Content-Type": "text/plain"})
    assert reply.status == 415
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert server.post("/generate", body, headers=charset).status == 200


def test_slow_head_slow_body_and_idle_reader_are_closed(toy_artifact):
    limits = ["limits.header_s=0.5", "limits.body_idle_s=0.5", "limits.send_stall_s=0.5"]
    with serving(toy_artifact, *limits) as server:
        second = server.connect()
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in second.recv(65536)
        silent, half = server.connect(), server.connect()
        half.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        answer = half.recv(65536)
        check_error(answer, 408)
        assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert b"Retry-After" not in answer and b"Connection: close" in answer
        assert silent.recv(65536).startswith(b"HTTP/1.1 408")
        second.sendall(b"GET /hea")  # a kept connection owes a whole head too
        assert second.recv(65536).startswith(b"HTTP/1.1 408")
        body = server.connect()
        body.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n" + JSON + b"\r\n{"
        )
        check_error(body.recv(65536), 408)


def test_a_reader_that_stops_is_aborted(toy_artifact):
    # Slow steps: the stall must end the request, not its last token.
    with serving(toy_artifact, "limits.send_stall_s=0.5", "null_step_s=0.02") as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        # Cumulative messages of 200 outputs: far more than the kernel buffers.
        params = {"max_new_tokens": 900, "ignore_eos": True, "n": 100}
        data = json.dumps({"input_ids": [5], "stream": True, "sampling_params": params}).encode()
        sock.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\n" + JSON
            + b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
        )  # fmt: skip
        wait_until(lambda: server.info()["in_flight"] > 0)
        wait_until(lambda: server.info()["in_flight"] == 0, 15)
        assert server.get("/health").status == 200
        with pytest.raises(ConnectionError):
            for _ in range(100_000):
                if not sock.recv(1 << 16):
                    raise ConnectionError


def test_connection_caps(toy_artifact):
    with serving(toy_artifact, "limits.connections_per_address=5") as server:
        held = [server.connect() for _ in range(5)]
        time.sleep(0.2)
        answer = raw_refused(server)
        check_error(answer, 429)
        assert b"Retry-After: 1\r\n" in answer
        for sock in held:
            sock.close()
        wait_until(lambda: server.get("/health").status == 200)


def raw_refused(server: ServerProcess) -> bytes:
    with server.connect() as sock:
        return sock.recv(65536)


NAMES = """
text input_ids sampling_params rid return_logprob logprob_start_len top_logprobs_num stream prompt
messages max_tokens n logprobs stop seed temperature logit_bias echo tools role content top_k top_p
max_new_tokens stop_token_ids priority extra_key chat_template_kwargs stream_options
"""
FIELDS = st.sampled_from(sorted(NAMES.split()))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 130),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["user", "system", "<|im_end|>", "text"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(FIELDS, st.text(max_size=5)), inner, max_size=4),
    ),
    max_leaves=8,
)
SEEDS = st.sampled_from(
    [
        ("/generate", {"text": "the", "sampling_params": {"max_new_tokens": 3}}),
        ("/generate", {"input_ids": [[4, 5], [6]], "stream": True}),
        ("/v1/completions", {"prompt": "the", "max_tokens": 3}),
        ("/v1/completions", {"prompt": ["the", "a"], "logprobs": 1, "echo": True, "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
        ("/tokenize", {"prompt": "the"}),
        ("/detokenize", {"tokens": [1, 2]}),
        ("/abort_request", {"rid": "x"}),
    ]
)  # fmt: skip


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    seed=SEEDS,
    changes=st.dictionaries(FIELDS, VALUES, max_size=3),
    params=st.one_of(st.none(), st.dictionaries(FIELDS, VALUES, max_size=3)),
)
def test_fuzzed_bodies_never_give_5xx(server: ServerProcess, seed, changes, params):
    path, body = seed
    body = body | changes
    if params is not None and isinstance(body.get("sampling_params"), dict):
        body["sampling_params"] = body["sampling_params"] | params
    reply = server.post(path, body, timeout=60)
    assert reply.status in (200, 400, 404, 429), (path, body, reply.body[:300])
    assert b"Traceback" not in reply.body


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=200), cut=st.integers(0, 60))
def test_fuzzed_bytes_never_give_5xx(server: ServerProcess, data: bytes, cut: int):
    good = b'{"text":"the","sampling_params":{"max_new_tokens":1,"stop":["a"]}}'
    reply = server.post("/generate", good[:cut] + data + good[cut:])
    assert reply.status in (200, 400)
