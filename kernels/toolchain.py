"""Builds the native CPU kernel library, one per instruction-set level, with the machine's C++
compiler.

In: the sources of kernels/cpu, a level, a cache directory. Out: the path of a shared library that
depends on nothing but libc. Called by the compiler's pack stage and by kernel tests; needs no
device and no Python package.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kernels.cache import cached, key_of

SOURCES = Path(__file__).parent / "cpu"
COMPILERS = ("c++", "g++", "clang++")

# No -ffast-math: results must not depend on how a loop was split, and NaN must stay visible.
# Contraction to fused multiply-add is on everywhere: it is per expression, so every row of a batch
# gets the same rounding.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
)
LINK_FLAGS = (
    "-shared",
    "-pthread",
    "-static-libgcc",
    "-static-libstdc++",
    "-Wl,--build-id=none",
    "-Wl,-s",
)
EXPORTS = (
    "{ global: hs_*; local: *; };\n"  # templates of the standard library would be visible otherwise
)


class ToolchainError(Exception):
    """There is no usable C++ compiler, or it refused our sources."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """`requires`: the /proc/cpuinfo feature names a machine needs to run the library. `own`: the
    sources that use what the level has beyond `base`; the others are compiled for `base`, once."""

    name: str
    machine: str | None  # None: any
    flags: tuple[str, ...]
    requires: tuple[str, ...]
    base: str | None = None
    own: tuple[str, ...] = ()

    def flags_of(self, source: str) -> tuple[str, ...]:
        if self.base is None or source in self.own:
            return self.flags
        return level(self.base).flags_of(source)


_V3 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni")
_BF16 = (*_V4, "avx512_bf16")
_AMX = (*_BF16, "amx_tile", "amx_int8", "amx_bf16")
_V4_FLAGS = ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512")

# Least demanding first.
CPU_LEVELS: tuple[Level, ...] = (
    Level(name="portable", machine=None, flags=(), requires=()),
    Level(name="x86-64-v3", machine="x86_64", flags=("-march=x86-64-v3",), requires=_V3),
    Level(name="x86-64-v4", machine="x86_64", flags=_V4_FLAGS, requires=_V4),
    Level(
        name="x86-64-v4-bf16",
        machine="x86_64",
        flags=(*_V4_FLAGS, "-mavx512bf16"),
        requires=_BF16,
        base="x86-64-v4",
        own=("linear.cpp",),
    ),
    Level(
        name="amx",
        machine="x86_64",
        flags=(*_V4_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
        requires=_AMX,
        base="x86-64-v4",
        own=("linear.cpp",),
    ),
)


def level(name: str) -> Level:
    for found in CPU_LEVELS:
        if found.name == name:
            return found
    raise ToolchainError(
        f"CPU level {name!r} is unknown: valid levels are {', '.join(v.name for v in CPU_LEVELS)}"
    )


def machine_levels(machine: str | None = None) -> tuple[Level, ...]:
    """Levels that can be built for a machine type (default: this one)."""
    wanted = machine or platform.machine()
    return tuple(v for v in CPU_LEVELS if v.machine in (None, wanted))


def supported_levels() -> tuple[Level, ...]:
    """Levels this machine can run, best last."""
    features = cpu_features()
    return tuple(v for v in machine_levels() if features.issuperset(v.requires))


def cpu_features() -> frozenset[str]:
    """Feature names of /proc/cpuinfo (`flags` on x86, `Features` on arm)."""
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def find_compiler() -> str:
    """`$CXX`, or the first of c++, g++, clang++ on the path."""
    chosen = os.environ.get("CXX")
    if chosen:
        found = shutil.which(chosen)
        if found is None:
            raise ToolchainError(
                f"CXX={chosen} is not an executable: set CXX to a C++17 compiler or unset it"
            )
        return found
    for name in COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise ToolchainError(
        f"no C++ compiler: none of {', '.join(COMPILERS)} is on the path; install one "
        "(apt-get install g++) or set CXX"
    )


def compiler_version(compiler: str) -> str:
    """Name, version and target machine: what decides the bytes a compiler writes."""
    return (
        _run([compiler, "--version"]).splitlines()[0]
        + " "
        + _run([compiler, "-dumpmachine"]).strip()
    )


def build_cpu(name: str, cache_dir: Path) -> Path:
    """The library of a level, from the cache or built now."""
    return build_levels([name], cache_dir)[0]


def build_levels(names: Sequence[str], cache_dir: Path) -> list[Path]:
    """The libraries of several levels, whose objects are compiled side by side."""
    chosen = [level(name) for name in names]
    compiler = find_compiler()
    files = sorted(p for p in SOURCES.iterdir() if p.suffix in (".cpp", ".h"))
    parts: dict[str, str | bytes] = {f"source/{p.name}": p.read_bytes() for p in files}
    parts["compiler"] = compiler_version(compiler)
    units = [p.name for p in files if p.suffix == ".cpp"]
    root = Path(cache_dir).expanduser() / "cpu"
    cores = len(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory(prefix="headstart-") as work,
        ThreadPoolExecutor(cores) as pool,
        ThreadPoolExecutor(len(chosen)) as levels,
    ):
        objects = _Objects(compiler, Path(work), pool)

        def library(of: Level) -> Path:
            flags = [f"{unit} {' '.join(of.flags_of(unit))}" for unit in units]
            text = "\0".join((*FLAGS, "|", *flags, "|", *LINK_FLAGS, "|", EXPORTS))
            build = partial(_link, compiler, objects, of, units)
            key = key_of(parts | {"flags": text})
            return cached(root, key, f"headstart-{of.name}.so", build)

        return list(levels.map(library, chosen))


class _Objects:
    """Each distinct object once. No path and no time reaches it."""

    def __init__(self, compiler: str, work: Path, pool: ThreadPoolExecutor) -> None:
        self._compiler = compiler
        self._work = work
        self._pool = pool
        self._lock = threading.Lock()
        self._made: dict[tuple[str, tuple[str, ...]], Future[Path]] = {}

    def of(self, source: str, flags: tuple[str, ...]) -> Future[Path]:
        with self._lock:
            if (source, flags) not in self._made:
                target = self._work / f"{len(self._made)}.o"
                self._made[source, flags] = self._pool.submit(self._make, source, flags, target)
            return self._made[source, flags]

    def _make(self, source: str, flags: tuple[str, ...], target: Path) -> Path:
        fixed = ("-frandom-seed=" + source, f"-ffile-prefix-map={SOURCES}=.")
        command = [self._compiler, *FLAGS, *flags, *fixed, "-c", source, "-o", str(target)]
        _run(command, SOURCES)
        return target


def _link(compiler: str, objects: _Objects, of: Level, units: list[str], path: Path) -> None:
    made = [objects.of(unit, of.flags_of(unit)) for unit in units]
    exports = path.parent / "exports.map"
    exports.write_text(EXPORTS)
    script = f"-Wl,--version-script={exports}"
    inputs = [str(each.result()) for each in made]
    _run([compiler, *inputs, *LINK_FLAGS, script, "-o", str(path)])
    exports.unlink()


def _run(command: list[str], cwd: Path | None = None) -> str:
    # The compiler's messages and defaults must not depend on the user's language or paths.
    kept = {
        k: v for k, v in os.environ.items() if k in ("PATH", "TMPDIR", "HOME", "LD_LIBRARY_PATH")
    }
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**kept, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise ToolchainError(
            f"{command[0]} cannot be started: {error}; set CXX to a C++17 compiler"
        ) from error
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise ToolchainError(
            f"{' '.join(command)} ended with status {done.returncode}: GCC 11, Clang 14 or "
            f"newer is needed\n{tail}"
        )
    return done.stdout
