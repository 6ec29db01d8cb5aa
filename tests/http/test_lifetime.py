"""What happens when things end: clients, engine, parent, server, port, artifact."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from serving import ENDLESS, ROOT, alive, serving, wait_until

from runtime.artifact import Artifact
from runtime.http.lifetime import slow_step_s

SLOW = {"input_ids": [7, 8, 9], "sampling_params": ENDLESS}


def test_a_slow_machine_is_not_a_stalled_engine(toy_artifact):
    manifest = Artifact.open(toy_artifact).manifest
    steps = {"t1": {"flops": 10**9}, "t512": {"flops": 512 * 2 * 8 * 10**9}}
    large = msgspec.structs.replace(manifest, report={"steps": steps})
    assert slow_step_s(large) > 400  # an 8B prompt chunk at 20 GFLOP/s
    assert slow_step_s(msgspec.structs.replace(manifest, report={})) == 0


def read_to_end(sock) -> bytes:
    data = b""
    while chunk := sock.recv(1 << 16):
        data += chunk
    return data


def test_disconnect_aborts_streams_and_whole_answers(toy_artifact):
    with serving(toy_artifact, "null_step_s=0.02") as server:
        stream = server.open_stream(SLOW)
        whole = server.connect()
        body = b'{"input_ids":[5],"sampling_params":{"max_new_tokens":900,"ignore_eos":true}}'
        whole.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        wait_until(lambda: server.info()["in_flight"] == 2)
        stream.close()
        whole.close()
        wait_until(lambda: server.info()["in_flight"] == 0, 2)
        server.wait_idle(3)  # 900 steps would take 18 s


def test_abort_request_by_name_ends_only_that_one(toy_artifact):
    with serving(toy_artifact, "null_step_s=0.02") as server:
        first = server.open_stream(SLOW | {"rid": "first"})
        second = server.open_stream(SLOW | {"rid": "first_2"})
        duplicate = server.post("/generate", SLOW | {"rid": "first"})
        assert duplicate.status == 400
        assert duplicate.message == "Duplicate request ID detected: first"
        assert server.post("/abort_request", {"rid": "first"}).status == 200
        assert server.post("/abort_request", {"rid": "unknown"}).status == 200
        data = read_until_done(first)
        assert b'"finish_reason":{"type":"abort"' in data and data.count(b"[DONE]") == 1
        assert server.info()["in_flight"] == 1
        for wrong in ({"abort_all": "yes"}, {"rid": 5}, {"name": "first"}, []):
            assert server.post("/abort_request", wrong).status == 400
        assert server.info()["in_flight"] == 1
        assert server.post("/abort_request", {"abort_all": True}).status == 200
        assert b'"type":"abort"' in read_until_done(second)
        aborted = 'headstart:num_aborted_requests_total{model_name="toy"} 2.0'
        assert aborted in server.get("/metrics").body.decode()


@pytest.mark.parametrize("batch", [{"n": 2}, {"prompts": 2}])
def test_the_name_of_a_call_aborts_all_of_it(toy_artifact, batch: dict):
    with serving(toy_artifact, "null_step_s=0.02") as server:
        body = {
            "input_ids": [[7, 8]] * batch.get("prompts", 1),
            "sampling_params": ENDLESS | {"n": batch.get("n", 1)},
            "rid": "call",
        }
        stream = server.open_stream(body)
        assert server.post("/generate", SLOW | {"rid": "call"}).status == 400
        assert server.post("/generate", SLOW | {"rid": "call_1"}).status == 400
        wait_until(lambda: server.info()["in_flight"] == 2)
        assert server.post("/abort_request", {"rid": "call_1"}).status == 200
        wait_until(lambda: server.info()["in_flight"] == 1)
        assert server.post("/abort_request", {"rid": "call"}).status == 200
        assert read_until_done(stream).count(b'"type":"abort"') == 2


def read_until_done(sock) -> bytes:
    data = b""
    while b"[DONE]" not in data:
        chunk = sock.recv(1 << 16)
        assert chunk, data[-300:]
        data += chunk
    return data


def test_engine_killed_under_load(toy_artifact):
    """One error per client within a second, and a server that is ready again."""
    with serving(toy_artifact, "null_step_s=0.02") as server:
        streams = [server.open_stream(SLOW) for _ in range(8)]
        whole: list = []
        waiting = threading.Thread(target=lambda: whole.append(server.post("/generate", SLOW)))
        waiting.start()
        wait_until(lambda: server.info()["in_flight"] == 9)
        before = server.engine_pid()
        os.kill(before, signal.SIGKILL)
        start = time.monotonic()
        for stream in streams:
            data = read_until_done(stream)
            assert data.count(b'"error"') == 1 and data.count(b"[DONE]") == 1
            assert b'"retryable":true' in data
        waiting.join(5)
        assert time.monotonic() - start < 1
        assert whole[0].status == 503 and "Retry-After" in whole[0].headers
        wait_until(lambda: server.get("/health").status == 200, 5)
        assert time.monotonic() - start < 5
        assert server.generate(text="the", sampling_params={"max_new_tokens": 2}).status == 200
        assert server.engine_pid() != before and not alive(before)
        assert server.info()["restarts"] == 1


def test_stopped_engine_is_noticed_and_replaced(toy_artifact):
    """SIGSTOP leaves every descriptor open: only the heartbeat tells."""
    with serving(toy_artifact, "null_step_s=0.01", "limits.step_s=1.0") as server:
        stream = server.open_stream(SLOW)
        os.kill(server.engine_pid(), signal.SIGSTOP)
        assert b'"error"' in read_until_done(stream)
        wait_until(lambda: server.get("/health").status == 200, 10)
        assert any("engine stalled" in line for line in server.lines)


def test_no_orphan_after_kill_of_the_parent(toy_artifact):
    with serving(toy_artifact) as server:
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert server.post("/v1/chat/completions", chat).status == 200  # the template process runs
        children = [
            int(pid)
            for file in Path(f"/proc/{server.process.pid}/task").glob("*/children")
            for pid in file.read_text().split()
        ]
        assert len(children) == 2
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not any(map(alive, children)), 2)


def test_drain_finishes_what_runs_and_refuses_what_comes(toy_artifact):
    with serving(toy_artifact, "null_step_s=0.01") as server:
        body = {"input_ids": [7], "sampling_params": ENDLESS | {"max_new_tokens": 150}}
        stream = server.open_stream(body)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        refused = server.generate(text="the")
        assert refused.status == 503 and refused.headers["Retry-After"]
        assert refused.message == "The server is shutting down."
        assert server.get("/health").status == 503
        data = read_until_done(stream)
        assert b'"type":"length","length":150' in data and b'"error"' not in data
        assert server.process.wait(5) == 0


def test_drain_deadline_and_second_signal(toy_artifact):
    for overrides, signals in ((["drain_s=0.3"], 1), ([], 2)):
        with serving(toy_artifact, "null_step_s=0.05", *overrides) as server:
            stream = server.open_stream(SLOW)
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                server.wait_for("draining")
            data = read_until_done(stream)
            assert b"The server is shutting down." in data
            assert server.process.wait(5) == 0


def run_serve(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "runtime.serve", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_busy_port(toy_artifact):
    with serving(toy_artifact) as server:
        done = run_serve(f"artifact={toy_artifact}", "device='null'", f"port={server.port}")
        assert done.returncode == 7
        assert done.stderr.count("\n") == 1
        assert f"port {server.port}" in done.stderr and "port=" in done.stderr


def test_bad_artifacts_are_one_line_and_their_exit_code(toy_artifact, tmp_path):
    missing = run_serve(f"artifact={tmp_path / 'nothing'}", "device='null'", "port=0")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    damaged = tmp_path / toy_artifact.name
    shutil.copytree(toy_artifact, damaged)
    (damaged / "text" / "tokenizer.json").write_bytes(b"{}")
    done = run_serve(f"artifact={damaged}", "device='null'", "port=0")
    assert done.returncode == 4, done.stderr
    assert "tokenizer.json" in done.stderr and "Traceback" not in done.stderr


def test_engine_that_cannot_start_ends_the_server(toy_artifact):
    done = run_serve(f"artifact={toy_artifact}", "device='null'", "port=0", "max_running=100000")
    assert done.returncode == 2
    assert "max_running" in done.stderr and "Traceback" not in done.stderr
