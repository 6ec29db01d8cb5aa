"""Model sources: directories, packaged models, and a local server that answers like the hub
(download, cache, refusals).
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from compiler.errors import CompileError
from compiler.hub import HubError, locate

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "model.safetensors": bytes(1000),
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle nobody asked for",
    "modeling_custom.py": b"print('never')",
    "original/consolidated.00.pth": b"another pickle",
    "consolidated.safetensors": bytes(2000),
}


class Hub(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/gated/model"):
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        if not path.startswith(("/api/models/org/model", "/org/model/resolve/")):
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in FILES.items()
            ]
            return self.reply(200, json.dumps(tree).encode(), {}, body)
        if path.startswith("/api/"):
            if path.rsplit("/", 1)[-1] not in ("main", "model", COMMIT):
                return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": "org/model", "sha": COMMIT, "siblings": siblings}
            return self.reply(200, json.dumps(info).encode() if body else b"", {})
        data = FILES[path.split("/resolve/")[1].split("/", 1)[1]]
        etag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.reply(200, data, etag, body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def fetch(source: str, home: Path, endpoint: str, revision: str | None = None) -> tuple[int, str]:
    """In its own process: the library reads its environment when it is imported."""
    code = (
        "import sys; from compiler.hub import locate; from compiler.errors import HeadstartError\n"
        f"try: print(locate({source!r}, {revision!r}))\n"
        "except HeadstartError as e: print(e); sys.exit(e.exit_code)"
    )
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.strip()


def test_download_then_cache_without_a_network(hub: str, tmp_path: Path) -> None:
    code, found = fetch("org/model", tmp_path, hub)
    assert code == 0, found
    directory = Path(found)
    assert directory.name == COMMIT
    wanted = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in directory.rglob("*") if p.is_file()} == wanted
    for name in wanted:
        assert (directory / name).read_bytes() == FILES[name]
    assert not any(path.endswith((".bin", ".pth", ".py")) for path in Hub.asked)
    assert fetch("org/model", tmp_path, "http://127.0.0.1:9") == (0, found)


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("org/absent", None, "does not exist or is private"),
        ("gated/model", None, "is gated; accept its licence"),
        ("org/model", "v9", "has no revision 'v9'"),
    ],
)
def test_refusals_say_what_to_do(
    hub: str, tmp_path: Path, source: str, revision: str | None, message: str
) -> None:
    code, said = fetch(source, tmp_path, hub, revision)
    assert code == 5 and said.startswith(f"model.source={source}: ") and message in said
    assert "\n" not in said


def test_no_network_and_no_cache(tmp_path: Path) -> None:
    code, said = fetch("org/model", tmp_path, "http://127.0.0.1:9")
    assert code == 5 and "cannot be reached" in said and "\n" not in said


def test_local_sources(tmp_path: Path) -> None:
    assert locate(str(tmp_path), None) == tmp_path
    assert (locate("package:tiny", None) / "config.json").is_file()
    for source in ("package:huge", "/no/such/dir", "nowhere", "a/b/c"):
        with pytest.raises(CompileError, match=f"model.source={source}"):
            locate(source, None)


def test_modelscope_is_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(CompileError, match=r"pip install 'headstart\[modelscope\]'"):
        locate("modelscope:qwen/Qwen2-0.5B", None)


def test_modelscope_errors_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def snapshot_download(model_id: str, **options: object) -> str:
            raise RuntimeError("404 no such model\nmore text")

    monkeypatch.setitem(sys.modules, "modelscope", Module)  # type: ignore[arg-type]
    with pytest.raises(HubError, match=r"modelscope:a/b: .*404 no such model\)"):
        locate("modelscope:a/b", None)


def test_modelscope_gets_the_same_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its API as documented: snapshot_download(model_id, revision=…, allow_patterns=…,
    ignore_patterns=…).
    """
    asked: dict[str, object] = {}

    class Module:
        @staticmethod
        def snapshot_download(model_id: str, **options: object) -> str:
            asked.update(options, id=model_id)
            return str(tmp_path)

    monkeypatch.setitem(sys.modules, "modelscope", Module)  # type: ignore[arg-type]
    assert locate("modelscope:qwen/Qwen2-0.5B", "v1") == tmp_path
    assert asked["id"] == "qwen/Qwen2-0.5B" and asked["revision"] == "v1"
    assert "config.json" in asked["allow_patterns"]  # type: ignore[operator]


@pytest.mark.parametrize("source", ["package:tiny", "."])
def test_a_directory_has_no_revisions(source: str) -> None:
    assert locate(source, None).is_dir()
    with pytest.raises(CompileError, match=r"model\.revision=v1: .* is a directory"):
        locate(source, "v1")


def test_an_empty_source_is_not_this_directory() -> None:
    with pytest.raises(CompileError, match="is empty"):
        locate("", None)
