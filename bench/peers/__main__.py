"""Ours against its peers, in one run: `python -m bench.peers [precision=[fp32,int8] …]`.

Every peer is a child process with one model (bench/peers/worker.py). Rounds are interleaved: in
each round every peer does every workload once, so that a disturbance hits all alike; the figures
are medians over rounds. Before and after every decode run the read bandwidth is measured, over a
buffer of the size of our weights. Out: a table of tokens per second, ratios, per cent of the
bandwidth bound, and one JSON line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median

from tqdm import tqdm

from bench import results
from bench.bandwidth import Bandwidth, Rate, share_of_bound
from bench.errors import BenchError, BenchUsage
from bench.peers.launch import Skip, Worker, launch
from bench.peers.shape import Shape
from bench.peers.table import Figures, render, result_lines
from bench.peers.worker import PEERS
from bench.peers.workloads import Workload, workloads
from compiler.importer import published_dtype
from conf.bench_schema import PeersConfig
from conf.load import run
from kernels.cpu.run import Team
from kernels.toolchain import supported_levels

PRECISIONS = ("fp32", "bf16", "int8", "int4")


def check(config: PeersConfig) -> None:
    for option, given, valid in (
        ("peers", config.peers, tuple(PEERS)),
        ("precision", config.precision, PRECISIONS),
        ("artifacts", list(config.artifacts), PRECISIONS),
    ):
        for name in given:
            if name not in valid:
                raise BenchUsage(f"{option}: no {name!r}; choices: {', '.join(valid)}")


def measure(
    precision: str, config: PeersConfig, shape: Shape, threads: int
) -> tuple[list[Figures], Rate, float]:
    """All peers at one precision; the read bandwidth of the same minutes, over how many bytes."""
    todo = workloads(config)
    workers: list[Worker] = []
    with ExitStack() as stack:
        for peer in config.peers:
            try:
                workers.append(launch(peer, precision, config, shape, threads))
            except Skip as e:
                print(f"# {precision}: {peer} skipped: {e}", file=sys.stderr)
            else:
                stack.callback(workers[-1].close)
        if not workers:
            raise BenchError(f"no peer can run {precision}: see the lines above")
        ours = next((w for w in workers if w.peer == "headstart"), workers[0])
        team = stack.enter_context(Team(supported_levels()[-1].name, threads))
        buffer = stack.enter_context(closing(Bandwidth(int(ours.weight_bytes), team.call)))
        samples: dict[tuple[str, Workload], list[float]] = {}
        shares: dict[tuple[str, Workload], list[float]] = {}
        bar = tqdm(total=config.rounds * len(todo) * len(workers), file=sys.stderr, desc=precision)
        for _ in range(config.rounds):
            for workload in todo:
                before = buffer.read()
                for worker in workers:
                    seconds = worker.run(workload, config.steps)
                    samples.setdefault((worker.peer, workload), []).extend(seconds)
                    if workload.batch:
                        after = buffer.read()
                        reads = read_bytes(worker, workload)
                        share = share_of_bound(reads, median(seconds), before, after)
                        shares.setdefault((worker.peer, workload), []).append(share)
                        before = after
                    bar.update(1)
        bar.close()
        rate = buffer.rate
    peers = {worker.peer: worker for worker in workers}
    figures = [
        Figures(
            precision=precision,
            peer=peer,
            workload=workload,
            seconds=median(seconds),
            best_seconds=min(seconds),
            version=peers[peer].version,
            read_bytes=read_bytes(peers[peer], workload),
            share_of_bound=median(shares[peer, workload]) if workload.batch else None,
        )
        for (peer, workload), seconds in samples.items()
    ]
    return figures, rate, ours.weight_bytes


def read_bytes(worker: Worker, workload: Workload) -> float:
    """Bytes a decode step must read: all weights, and the contexts' keys and values."""
    return worker.weight_bytes + workload.batch * workload.context * worker.kv_token_bytes


def main(config: PeersConfig, sources: Mapping[str, str]) -> int:
    check(config)
    results.warn_if_busy()
    threads = config.threads or len(os.sched_getaffinity(0))
    shape = Shape.load(config.model, config.checkpoint_dtype)
    Path(config.directory).mkdir(parents=True, exist_ok=True)
    everything: list[Figures] = []
    rates: dict[str, Rate] = {}
    for precision in config.precision:
        figures, rates[precision], size = measure(precision, config, shape, threads)
        everything += figures
        print(render(figures, rates[precision], size, shape.name), flush=True)
    line = {
        "model": config.model,
        "checkpoint_dtype": published_dtype(shape.config),
        "threads": threads,
        "rounds": config.rounds,
        "steps": config.steps,
        "results": result_lines(everything, rates),
    }
    results.append(config.output_file, results.stamp("peers", line))
    return 0


if __name__ == "__main__":
    sys.exit(run(PeersConfig, "bench/peers", main))
