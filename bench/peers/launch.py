"""Starts a peer's worker process with what it needs: our artifact, a GGUF file, or a config.

`launch` raises `Skip` with the reason when a peer is not installed or has no such precision.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.peers.shape import Shape
from bench.peers.workloads import Workload
from bench.static_batch import step_bytes
from compiler.importer import published_dtype
from conf.bench_schema import PeersConfig
from runtime.artifact import Artifact

ROOT = Path(__file__).resolve().parents[2]
GGUF = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
OURS = {
    "fp32": ["dtype=float32", "quant=none"],
    "bf16": ["dtype=bfloat16", "quant=none"],
    "int8": ["dtype=float32", "quant=int8"],
    "int4": ["dtype=float32", "quant=int4"],
}


BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.5, "int4": 4.5}  # with 16-bit scales of groups of 32


class Skip(Exception):
    """This peer does not take part; the message says why."""


class Worker:
    """One running peer. `weight_bytes`: what its decode steps read of the weights."""

    def __init__(
        self, peer: str, python: str, setup: dict[str, Any], threads: int, weight_bytes: float
    ) -> None:
        self.peer, self.weight_bytes = peer, weight_bytes
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [python, "-m", "bench.peers.worker", peer, json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        hello = self._answer()
        self.version: str = hello["version"]
        self.kv_token_bytes: float = hello["kv_token_bytes"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._process.stderr.read().strip().splitlines()[-1:]
            code = self._process.wait()
            raise BenchError(f"{self.peer} ended with code {code}: {''.join(last)}")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def run(self, workload: Workload, steps: int) -> list[float]:
        """Seconds of every timing of one round."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(workload.command(steps)) + "\n")
        self._process.stdin.flush()
        return workload.seconds(self._answer())

    def close(self) -> None:
        """End of input ends the worker."""
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def launch(peer: str, precision: str, config: PeersConfig, shape: Shape, threads: int) -> Worker:
    longest = max(*config.context, *config.prefill) + config.steps + 32
    sizes = {"threads": threads, "max_batch": max(config.batch), "context": longest}
    if peer == "headstart":
        path = _artifact(precision, config, shape)
        reads = step_bytes(Artifact.open(path), 0, 0)  # float32 may be stored as bfloat16
        return Worker(peer, sys.executable, {"path": path, **sizes}, threads, reads)
    reads = weight_bytes(shape, precision)
    if peer == "llama.cpp":
        python = Path(config.directory) / "venv" / "bin" / "python"
        if not python.exists():
            raise Skip(f"not installed in {config.directory} (make peers builds it)")
        setup = {"path": str(_gguf(precision, config, shape)), **sizes}
        return Worker(peer, str(python), setup, threads, reads)
    needed = ["torch", *(["transformers"] if peer == "transformers" else [])]
    needed += ["torchao"] if precision in ("int8", "int4") else []
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is not installed (make setup installs it)")
    setup = {"name": shape.name, "config": shape.config, "precision": precision, **sizes}
    return Worker(peer, sys.executable, setup, threads, reads)


def weight_bytes(shape: Shape, precision: str) -> float:
    """Bytes a decode step reads of the weights where all are stored in `precision`: every matrix
    once (an untied embedding: a row)."""
    matrices = [
        a * b
        for name, (a, *rest) in shape.tensors()
        for b in rest
        if shape.tied or not name.startswith("model.embed")
    ]
    return sum(matrices) * BITS[precision] / 8


def _artifact(precision: str, config: PeersConfig, shape: Shape) -> str:
    """Ours: the given artifact, or a compile from random weights."""
    if precision in config.artifacts:
        return config.artifacts[precision]
    command = [sys.executable, "-m", "compiler", f"model={config.model}", "weights=random"]
    command += [*OURS[precision], f"model.config.dtype={published_dtype(shape.config)}"]
    command += [f"out={config.directory}/artifacts"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"compile of {precision} failed: {done.stderr.strip()[-500:]}")
    return done.stdout.strip().splitlines()[-1]


def _gguf(precision: str, config: PeersConfig, shape: Shape) -> Path:
    format = GGUF[precision]
    path = Path(config.directory) / "gguf" / f"{shape.name}.{format}.gguf"
    if not path.exists():
        if importlib.util.find_spec("gguf") is None:
            raise Skip("the gguf package is not installed (pip install 'headstart[peers]')")
        from bench.peers.gguf_file import write_gguf

        write_gguf(shape, format, path)
    return path
