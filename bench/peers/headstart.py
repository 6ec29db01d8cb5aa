"""Ours: the artifact through scheduler, engine loop and plan, greedy sampling included."""

from __future__ import annotations

from bench.static_batch import StaticBatch
from runtime.artifact import Artifact


class Headstart:
    def __init__(self, path: str, threads: int) -> None:
        artifact = Artifact.open(path)
        self._name = f"headstart {artifact.manifest.tool}, artifact {artifact.digest}"
        # Without a prefix cache a prompt takes pages that were in use before, as in a server that
        # has been running: the first touch of a page is the system's work, not ours.
        self._kv = artifact.manifest.state.page_bytes / artifact.manifest.state.page_size
        self._static = StaticBatch.open(artifact, threads=threads, prefix_cache=False)
        self._seed = 1 << 20

    def version(self) -> str:
        return self._name

    def kv_token_bytes(self) -> float:
        return self._kv

    def prefill(self, tokens: int) -> float:
        self._seed += 1
        return self._static.run(self._static.prompts(1, tokens, self._seed), 1).prefill

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        prompts = self._static.prompts(batch, context, seed=context)
        return self._static.run(prompts, steps + 1).decode

    def close(self) -> None:
        self._static.close()


def open_runner(*, path: str, threads: int, max_batch: int, context: int) -> Headstart:
    return Headstart(path, threads)
