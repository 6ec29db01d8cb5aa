"""`python -m bench.gpu.bundle` (`make gpu-bundle`): what `make gpu` and `make tune` need on a bare
GPU machine without a network, into one folder that travels with the repository.

Wheels of the packages missing there (wheels.py), kernels built here (a minute of compiling is a
minute of GPU), and the CPU artifact whose tokens the GPU's are compared with. Weights are made over
there from their seed. Kernels are built for `minutes`, the most valuable first, and every call goes
on where the last one ended, since what is built is in the cache.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

from bench.device_bandwidth import read_launches
from bench.errors import BenchError
from bench.gpu import calls, contracts, probes
from bench.gpu.model import cache_option, program, tiny_words, words
from bench.gpu.wheels import KERNELS, WHEELS, WheelError, fetch
from compiler.design import nodes_of
from compiler.tune import anchors, ordered
from compiler.tune_search import Search
from compiler.tuned import load_records
from conf.bench_schema import BundleConfig
from conf.load import run
from kernels.cuda.build import ARCH, Builders, key
from kernels.launch import Source
from kernels.toolchain import ToolchainError

MULTIPROCESSORS = 132  # of H100 and H200
MIB = 1 << 20


def main(config: BundleConfig, sources: Mapping[str, str]) -> int:
    config = replace(config, hardware=config.hardware or "h200")
    deadline = time.monotonic() + 60 * config.minutes
    folder = Path(config.bundle)
    if config.wheels:
        try:
            found = fetch(folder / WHEELS, config.python)
        except WheelError as error:
            raise BenchError(str(error)) from None
        show(f"{len(found)} wheels for Python {config.python}")
    for old in folder.glob("tokens-cpu-*"):
        shutil.rmtree(old)
    program("compiler", *tiny_words("cpu"), f"out={folder}", cache_option(config))
    cache = Path(config.cache).expanduser()
    entries = built(config, cache, deadline)
    with tarfile.open(folder / KERNELS, "w:xz") as tar:
        for entry in sorted(entries):
            tar.add(cache / "cuda" / entry, arcname=f"cuda/{entry}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    show(f"{folder}: {size / MIB:.1f} MiB with {len(entries)} kernels")
    return 0


def show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def built(config: BundleConfig, cache: Path, deadline: float) -> list[str]:
    """Cache entries of all kernels wanted that are built when the time is over."""
    entries: dict[str, None] = {}
    seen: set[Source] = set()
    try:
        with Builders(cache, jobs=config.jobs or len(os.sched_getaffinity(0))) as builders:
            for what, wanted in groups(config):
                new = [source for source in dict.fromkeys(wanted) if source not in seen]
                seen |= set(new)
                futures = {source: builders.submit(source) for source in new}
                left = max(deadline - time.monotonic(), 0)
                done = wait(futures.values(), left).done
                for source, future in futures.items():
                    if future in done and future.exception() is None:
                        entries[_entry(source)] = None
                failed = [f for f in done if f.exception() is not None]
                show(
                    f"{what}: {len(done) - len(failed)} of {len(new)} kernels"
                    f"{f', {len(failed)} cannot be built' if failed else ''}"
                )
    finally:  # a build that is under way is nobody's any more
        for child in multiprocessing.active_children():
            child.terminate()
    return list(entries)


def _entry(source: Source) -> str:
    try:
        return key(source, ARCH)
    except ToolchainError as error:
        raise BenchError(str(error)) from None


def groups(config: BundleConfig) -> Iterator[tuple[str, list[Source]]]:
    """What needs which kernels, in the order of their worth."""
    launches = [*read_launches(MULTIPROCESSORS, 1), *probes.launches()]
    yield "probes", [x.source for x in launches if x.source is not None]
    yield "contracts", contracts.sources()
    yield "tokens", _of_steps(tiny_words(str(config.hardware)))
    for model in config.models[:1]:
        yield model, _of_steps(words(config, model))
        yield f"calls of {model}", calls.sources(config, model)
        if config.tune:
            yield f"tuning of {model}", _searched(words(config, model))
    for model in config.models[1:]:
        yield model, _of_steps(words(config, model))
    for model in config.models[1:]:
        if config.tune:
            yield f"tuning of {model}", _searched(words(config, model))


def _searched(given: list[str]) -> list[Source]:
    """What every search of the buckets that matter most begins with."""
    base, _ = calls.drafted(given)
    searched = anchors(base.buckets)
    return [
        source
        for task in ordered(base)
        if task.bucket.name in searched
        for one in Search(task).wanted()
        for source in one.sources(task.node.shape)
    ]


def _of_steps(given: list[str]) -> list[Source]:
    """Of all steps of a model, as a compile would choose them."""
    base, settings = calls.drafted(given)
    records = load_records(settings.target.name, settings.records)
    return [
        launch.source
        for bucket in base.buckets
        for node in nodes_of(base.program, base.weights, bucket, "cuda", records)
        for launch in node.launches
        if launch.source is not None
    ]


if __name__ == "__main__":
    sys.exit(run(BundleConfig, "bench/bundle", main))
