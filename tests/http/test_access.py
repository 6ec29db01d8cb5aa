"""Who may call what: every route of the table, every kind of key; also health and metrics."""

from __future__ import annotations

import time

import pytest
from serving import ServerProcess, serving

from runtime.http.app import ROUTES, Route, Scope, build_app

API, ADMIN = {"Authorization": "Bearer api-key"}, {"Authorization": "Bearer admin-key"}
CALLS = [(method, route) for route in ROUTES for method in route.methods]
BAD = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "api-key"},
    {"Authorization": "Basic api-key"},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer \u00fc\u00ff"},
]


def call(server: ServerProcess, method: str, route: Route, headers: dict[str, str]) -> int:
    body = {} if method != "GET" else None
    return server.request(method, route.path.replace("{id}", "toy"), body, headers=headers).status


@pytest.fixture(scope="module", params=["both", "api", "admin"])
def guarded(request, toy_artifact):
    keys = {"both": ("api", "admin"), "api": ("api",), "admin": ("admin",)}[request.param]
    names = {"api": "api_key=api-key", "admin": "admin_api_key=admin-key"}
    with serving(toy_artifact, *(names[k] for k in keys)) as server:
        yield server, request.param


def test_every_route_against_every_key(guarded):
    server, keys = guarded
    for method, route in CALLS:
        open_to_all = (
            route.scope is Scope.OPEN
            or (route.scope is Scope.API and keys == "admin")
        )  # fmt: skip
        good = ADMIN if route.scope is Scope.ADMIN and keys != "api" else API
        other = API if good is ADMIN else ADMIN
        for headers in (*BAD, other):
            status = call(server, method, route, headers)
            known = headers is other and keys == "both"
            refused = status == (403 if known else 401)
            assert refused != open_to_all, (method, route.path, headers, status)
        assert call(server, method, route, good) in (200, 400), (method, route.path)


def test_only_probes_are_open_by_declaration():
    assert {r.path for r in ROUTES if r.scope is Scope.OPEN} == {"/health", "/ready"}


def test_a_route_without_scope_stops_the_start():
    from runtime.errors import UsageError

    route = Route(methods=("GET",), path="/new", handler=ROUTES[0].handler, scope=None)
    fake = type(
        "S", (), {"config": type("C", (), {"api_key": None, "admin_api_key": None, "host": "::1"})}
    )
    with pytest.raises(UsageError, match="/new"):
        build_app(fake, (*ROUTES, route))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:9", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("localhost/health?", 421),
    ],
)
def test_host_names_on_loopback(server: ServerProcess, host: str, status: int):
    assert server.get("/v1/models", headers={"Host": host}).status == status


def test_decided_on_the_matched_route_not_on_the_host_header(toy_artifact):
    with serving(toy_artifact, "api_key=api-key", "host=0.0.0.0") as server:
        reply = server.get("/v1/models", headers={"Host": "localhost/health?"})
        assert reply.status in (400, 401)
        assert server.get("/v1/models", headers={"Host": "any.example"} | API).status == 200


def test_keys_are_not_shown(toy_artifact):
    with serving(toy_artifact, "api_key=api-key", "admin_api_key=admin-key") as server:
        for path in ("/server_info", "/model_info", "/metrics"):
            body = server.get(path, headers=API).body
            assert b"api-key" not in body and b"admin-key" not in body
        assert not any("api-key" in line for line in server.lines)


def test_caches_of_two_keys_are_apart_by_default(toy_artifact):
    """The same prompt under the API key and under none would meet; the salt is the key's digest."""
    from runtime.text.call import salt

    assert salt(b"one") != salt(b"two")
    assert salt(b"one", "k") != salt(b"two", "k") != salt(b"two", "l")
    assert salt(b"one", "a", "b") != salt(b"one", "ab")


def test_unknown_route_and_method(server: ServerProcess):
    assert server.get("/nope").status == 404
    reply = server.get("/generate")
    assert reply.status == 405 and reply.headers["Allow"] == "POST,PUT"
    assert reply.json["error"]["code"] == 405


def test_no_cors(server: ServerProcess):
    reply = server.get("/health", headers={"Origin": "http://evil.example"})
    assert not any(name.lower().startswith("access-control") for name in reply.headers)


def test_health_ready_and_generate_probe(server: ServerProcess):
    for path in ("/health", "/ready", "/health_generate"):
        assert server.get(path).status == 200
    for path in ("/health", "/ready"):
        assert server.request("HEAD", path).status == 200


def test_info_routes(server: ServerProcess):
    model = server.get("/get_model_info").json
    assert model == server.get("/model_info").json
    assert model["served_model_name"] == "toy" and model["is_generation"] is True
    info = server.get("/get_server_info").json
    assert info["policy"] == "lpm" and info["internal_states"][0]["up"] is True
    capacity = info["internal_states"][0]["capacity"]
    assert info["max_running"] == capacity["max_seqs"]
    assert info["kv_tokens"] == info["max_total_num_tokens"]
    assert info["kv_tokens"] == capacity["pages"] * capacity["page_size"]
    assert info["max_step_tokens"] == capacity["max_step_tokens"] and info["startup_time"] > 0


def test_metrics_count_what_happened(server: ServerProcess):
    def read() -> dict[str, float]:
        lines = server.get("/metrics").body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    label = '{model_name="toy"}'
    before = read()
    params = {"max_new_tokens": 7, "ignore_eos": True}
    assert server.generate(input_ids=[4, 5, 6], sampling_params=params).status == 200
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown(f"headstart:prompt_tokens_total{label}") == 3
    assert grown(f"headstart:generation_tokens_total{label}") == 7
    assert grown(f"headstart:num_requests_total{label}") == 1
    assert grown(f"headstart:num_so_requests_total{label}") == 0
    assert server.generate(text="the", sampling_params={"regex": "[0-9]"}).status == 200
    structured = f"headstart:num_so_requests_total{label}"
    assert read()[structured] == before[structured] + 1
    assert grown(f"headstart:queue_time_seconds_count{label}") == 1
    assert 0 < grown(f"headstart:queue_time_seconds_sum{label}") < 60
    assert grown(f"headstart:time_to_first_token_seconds_count{label}") == 1
    assert grown(f"headstart:inter_token_latency_seconds_count{label}") == 6
    assert grown(f"headstart:e2e_request_latency_seconds_count{label}") == 1
    route = '{endpoint="/generate",status_code="200"}'
    assert grown(f"headstart:http_responses_total{route}") == 1
    assert after[f"headstart:context_len{label}"] == 1024
    assert after[f"headstart:weight_memory_usage_gb{label}"] == 0, "it has no weights"
    assert after[f"headstart:kv_cache_memory_usage_gb{label}"] > 0
    assert 'headstart:cached_tokens_total{cache_source="device",model_name="toy"}' in after


def test_flush_cache(server: ServerProcess):
    server.wait_idle()
    for method in ("GET", "POST"):
        assert server.request(method, "/flush_cache").status == 200


def test_flush_cache_is_refused_while_requests_run(toy_artifact):
    with serving(toy_artifact, "null_step_s=0.05") as server:
        body = {"input_ids": [7], "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}
        stream = server.open_stream(body)
        assert server.post("/flush_cache").status == 400
        start = time.monotonic()
        assert server.get("/flush_cache?timeout=0.3").status == 400
        assert time.monotonic() - start >= 0.3
        for bad in ("x", "-1", "nan", "1e9"):
            reply = server.get(f"/flush_cache?timeout={bad}")
            assert reply.status == 400 and "timeout must be a number of seconds" in reply.message
        stream.close()
        assert server.get("/flush_cache?timeout=20").status == 200


def test_access_log_is_json_and_rate_limited(toy_artifact):
    import json

    with serving(toy_artifact) as server:
        for _ in range(60):
            server.get("/v1/models/" + "x" * 50 + "%0a%1b")
        server.wait_for("/v1/models")
        lines = [json.loads(line) for line in server.lines]
        requests = [x for x in lines if x["logger"] == "headstart.access"]
        assert 0 < len(requests) < 45
        assert not any("xxxx" in x["event"] for x in requests)
