"""Read this first: the whole road on the embedded tiny model. Compile it, generate offline, serve
it, ask over HTTP.

The slower, deeper tests of each station mirror the tree beside this file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

from runtime import Engine

ROOT = Path(__file__).resolve().parent.parent
GREEDY = {"max_new_tokens": 12, "temperature": 0}
PROMPT = "The license"


def test_compile_prints_the_artifact(tiny_artifact: Path) -> None:
    manifest = json.loads((tiny_artifact / "manifest.json").read_text())
    assert manifest["name"] == "tiny"
    assert {"weights", "code", "plans", "text"} <= {p.name for p in tiny_artifact.iterdir()}


def test_engine_and_server_agree(tiny_artifact: Path) -> None:
    with Engine(artifact=str(tiny_artifact)) as engine:
        offline = engine.generate(PROMPT, GREEDY)
        both = engine.generate([PROMPT, "import"], GREEDY)
    assert offline["meta_info"]["completion_tokens"] == 12
    assert both[0]["output_ids"] == offline["output_ids"]

    server = subprocess.Popen(
        [sys.executable, "-m", "runtime.serve", f"artifact={tiny_artifact}", "port=0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = next(line for line in server.stdout if line.startswith("ready ")).split()[1]
        body = json.dumps({"text": PROMPT, "sampling_params": GREEDY}).encode()
        request = urllib.request.Request(
            f"{url}/generate", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            online = json.load(response)
    finally:
        server.terminate()
        assert server.wait(timeout=20) == 0
    assert online["text"] == offline["text"]
    assert online["output_ids"] == offline["output_ids"]
