"""Builds device code into cubins, without a GPU, a driver or torch; in parallel, from a persistent
cache.

In: sources and an architecture. Out: binaries with the ABI that was read back from them. Triton
runs in worker processes only, so the caller may be any process (one whose Triton is the
interpreter, too). Called by the compiler and by kernel tests.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from kernels.cache import cached, key_of
from kernels.launch import Binary, MapRecipe, Parameter, Source
from kernels.toolchain import ToolchainError

CODE = Path(__file__).parent / "code"
TRITON = (3, 6), (3, 10)  # supported: first included, last excluded
FORMAT = "1"  # of the cache entry
ARCH = "sm_90a"  # Hopper: of what is built beside a model, which has its target's
ARCHITECTURES = {ARCH: 90}
# Line tables would put absolute paths into the cubin and make it three times larger.
ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1"}
POOL_FROM = 3  # builds worth a second process


def build_cuda(
    sources: Iterable[Source], cache_dir: Path, arch: str = ARCH, jobs: int | None = None
) -> dict[Source, tuple[Binary, bytes]]:
    """Binary and image of every distinct source. ToolchainError names the source that fails."""
    if arch not in ARCHITECTURES:
        raise ToolchainError(
            f"architecture {arch!r} is not supported; choices: {', '.join(ARCHITECTURES)}"
        )
    wanted = list(dict.fromkeys(sources))
    root = Path(cache_dir).expanduser() / "cuda"
    tasks = [(source, arch, root, key(source, arch)) for source in wanted]
    missing = [task for task in tasks if not (root / task[3]).exists()]
    if missing:
        with _pool(len(missing), jobs) as pool:
            list(pool.map(_build_one, missing, chunksize=1))
    # What is there is read here; a damaged entry is built again in this call.
    return {source: _read(root, entry, source, arch) for source, _, _, entry in tasks}


def build_each(
    sources: Iterable[Source], cache_dir: Path, arch: str = ARCH, jobs: int | None = None
) -> tuple[dict[Source, tuple[Binary, bytes]], dict[Source, ToolchainError]]:
    """Like `build_cuda`, but sources that fail are given back with their errors."""
    wanted, root = list(dict.fromkeys(sources)), Path(cache_dir).expanduser() / "cuda"
    failed: dict[Source, ToolchainError] = {}
    tasks = []
    for source in wanted:
        try:
            tasks.append((source, arch, root, key(source, arch)))
        except ToolchainError as error:  # a tool that is not installed
            failed[source] = error
    missing = [task for task in tasks if not (root / task[3]).exists()]
    if missing:
        with _pool(len(missing), jobs) as pool:
            for task, future in [(task, pool.submit(_build_one, task)) for task in missing]:
                try:
                    future.result()
                except ToolchainError as error:
                    failed[task[0]] = error
    good = [source for source in wanted if source not in failed]
    return build_cuda(good, cache_dir, arch), failed


class Builders:
    """Builds in the background. `submit(source)`: a future that is done when the cubin is in the
    cache and raises ToolchainError when it cannot be built. Leaving the context drops what has not
    begun."""

    def __init__(self, cache_dir: Path, arch: str = ARCH, jobs: int | None = None) -> None:
        self._root, self._arch = Path(cache_dir).expanduser() / "cuda", arch
        spare = max(len(os.sched_getaffinity(0)) - 2, 1)  # cores for who waits for the builds
        self._pool = _pool(POOL_FROM * (jobs or spare), jobs or spare)
        self._submitted: dict[Source, Future[None]] = {}

    def submit(self, source: Source) -> Future[None]:
        if source not in self._submitted:
            self._submitted[source] = self._begun(source)
        return self._submitted[source]

    def _begun(self, source: Source) -> Future[None]:
        done: Future[None] = Future()
        try:
            entry = key(source, self._arch)
        except ToolchainError as error:  # a tool that is not installed
            done.set_exception(error)
            return done
        if (self._root / entry).exists():
            done.set_result(None)
            return done
        return self._pool.submit(_build_one, (source, self._arch, self._root, entry))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _pool(count: int, jobs: int | None) -> ProcessPoolExecutor:
    workers = min(jobs or len(os.sched_getaffinity(0)), -(-count // POOL_FROM))
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_prepare_worker)


def key(source: Source, arch: str) -> str:
    """Digest of everything the cubin depends on."""
    module = source.function.rpartition(".")[0]
    parts: dict[str, str | bytes] = {
        "format": FORMAT,
        "arch": arch,
        "source": repr(source),
        "tools": json.dumps(versions(source.language), sort_keys=True),
    }
    for name in _modules(module):
        parts[f"code/{name}"] = _file(name).read_bytes()
    return key_of(parts)


def versions(language: str = "triton") -> dict[str, str]:
    """The tools that decide a cubin's bytes."""
    if language == "cuda":
        from kernels.cuda.nvcc import version

        return {"nvcc": version()}
    return {"triton": triton_version(), "ptxas": ptxas_version()}


@cache
def triton_version() -> str:
    try:
        found = metadata.version("triton")
    except metadata.PackageNotFoundError:
        raise ToolchainError(
            "triton is not installed, it builds the CUDA kernels; pip install 'headstart[cuda]'"
        ) from None
    release = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    low, high = TRITON
    if not low <= release < high:
        raise ToolchainError(
            f"triton {found} is not supported: expected at least {low[0]}.{low[1]} and below "
            f"{high[0]}.{high[1]}; pip install 'headstart[cuda]'"
        )
    return found


def ptxas() -> Path:
    """The one assembler of all artifacts: Triton's own for CUDA 12, whose cubins load on 12 and 13
    drivers (newer Tritons would take another for some architectures)."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        raise ToolchainError("triton is not installed; pip install 'headstart[cuda]'")
    return Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "ptxas"


@cache
def ptxas_version() -> str:
    try:
        done = subprocess.run([ptxas(), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolchainError(f"{ptxas()} cannot be run: {error}; reinstall triton") from error
    match = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    return match[1] if match else done.stdout.strip().splitlines()[-1]


def _file(module: str) -> Path:
    for suffix in (".py", ".cu"):
        path = CODE / f"{module}{suffix}"
        if path.exists():
            return path
    raise ToolchainError(f"there is no device code {module} in {CODE}")


@cache
def _modules(module: str) -> tuple[str, ...]:
    """A code module and those it imports from kernels.cuda.code, transitively."""
    found = [module]
    for name in found:  # grows while it is read
        path = _file(name)
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    parts = node.module.split(".")
                    if parts[:3] == ["kernels", "cuda", "code"]:
                        inner = parts[3:4] or [alias.name for alias in node.names]
                        found += [part for part in inner if part not in found]
        else:
            for header in re.findall(r'#include "(\w+)\.cuh"', path.read_text("utf-8")):
                if header not in (*found, "launch"):  # made from the source
                    found.append(header)
    return tuple(found)


def _prepare_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(ENVIRONMENT)
    path = str(ptxas())
    os.environ.update({"TRITON_PTXAS_PATH": path, "TRITON_PTXAS_BLACKWELL_PATH": path})


def _build_one(task: tuple[Source, str, Path, str]) -> None:
    source, arch, root, entry = task

    def build(path: Path) -> None:
        if source.language == "cuda":
            from kernels.cuda.nvcc import compile_source
        else:
            from kernels.cuda.triton_compile import compile_source
        try:
            binary, image = compile_source(source, arch)
        except ToolchainError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises, named
            raise ToolchainError(
                f"kernel {source.function} {dict(source.constants)} warps={source.warps} "
                f"stages={source.stages} does not build for {arch}: {_brief(error)}"
            ) from None
        header = json.dumps(asdict(binary), sort_keys=True).encode()
        path.write_bytes(len(header).to_bytes(4, "little") + header + image)

    cached(root, entry, "kernel.bin", build)


def _brief(error: Exception) -> str:
    """What the compiler says, without the assembly that Triton puts behind it."""
    return str(error).partition("Repro command")[0].strip()


def _read(root: Path, entry: str, source: Source, arch: str) -> tuple[Binary, bytes]:
    def build(path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=_prepare_worker) as pool:
            pool.submit(_build_one, (source, arch, path.parent / "again", entry)).result()
        (path.parent / "again" / entry / "kernel.bin").rename(path)

    data = cached(root, entry, "kernel.bin", build).read_bytes()
    length = int.from_bytes(data[:4], "little")
    return decode_binary(json.loads(data[4 : 4 + length])), data[4 + length :]


def decode_binary(fields: dict[str, Any]) -> Binary:
    parameters = tuple(Parameter(**parameter) for parameter in fields.pop("parameters"))
    maps = {
        name: MapRecipe(**{**recipe, "box": tuple(recipe["box"])})
        for name, recipe in fields.pop("maps").items()
    }
    return Binary(**fields, parameters=parameters, maps=maps)


def all_versions(sources: Sequence[Source]) -> dict[str, str]:
    """Versions of every tool these sources need, for the manifest."""
    result: dict[str, str] = {}
    for language in sorted({source.language for source in sources}):
        result |= versions(language)
    return result
