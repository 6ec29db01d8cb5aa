"""One peer in one process: answers JSON lines on stdin with JSON lines on stdout.

Started by `bench.peers.__main__` as `python -m bench.peers.worker <peer> <setup json>`, if need be
with another interpreter (llama.cpp lives in its own environment), so it imports nothing but the
standard library and the peer's own module.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any, Protocol

PEERS = {
    "headstart": "bench.peers.headstart",
    "llama.cpp": "bench.peers.llama_cpp_peer",
    "torch": "bench.peers.torch_eager",
    "transformers": "bench.peers.transformers_generate",
}


class Runner(Protocol):
    """What a peer can do. Contexts are filled with random tokens; every decode step feeds one token
    to every sequence."""

    def version(self) -> str: ...

    def kv_token_bytes(self) -> float:
        """Bytes of the keys and values of one token, all layers."""
        ...

    def prefill(self, tokens: int) -> float:
        """Seconds from an empty cache to the logits after `tokens` tokens of one sequence."""
        ...

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        """Seconds of each decode step of `batch` sequences that each hold `context` tokens at the
        start."""
        ...

    def close(self) -> None: ...


def answer(runner: Runner, command: dict[str, Any]) -> dict[str, Any]:
    if command["do"] == "prefill":
        return {"seconds": runner.prefill(command["tokens"])}
    return {"steps": runner.decode(command["batch"], command["context"], command["steps"])}


def main(argv: list[str]) -> int:
    # Whatever the peer's libraries print must not end up between the answers.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module = importlib.import_module(PEERS[argv[0]])
    runner: Runner = module.open_runner(**json.loads(argv[1]))
    hello = {"version": runner.version(), "kv_token_bytes": runner.kv_token_bytes()}
    print(json.dumps(hello), file=out)
    for line in sys.stdin:
        print(json.dumps(answer(runner, json.loads(line))), file=out)
    runner.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
