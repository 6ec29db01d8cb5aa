"""Building the native library: reproducible, cached by content, damage found, errors that say
what to do."""

from __future__ import annotations

import ctypes
import itertools
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import kernels.cpu.register  # noqa: F401
from kernels import toolchain
from kernels.cache import DamagedBuild, cached, key_of
from kernels.cpu import run as native_run
from kernels.cpu.run import CACHE
from kernels.kernel import KERNELS
from kernels.toolchain import (
    CPU_LEVELS,
    Level,
    ToolchainError,
    build_cpu,
    build_levels,
    find_compiler,
    level,
    machine_levels,
    supported_levels,
)
from runtime.device.native import SIGNATURES


@pytest.mark.parametrize("level", [v.name for v in machine_levels()])
def test_every_level_builds_and_exports_every_entry(level: str) -> None:
    path = build_cpu(level, CACHE)
    names = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in names.splitlines()}
    assert {k.entry for k in KERNELS["cpu"]} | {"hs_abi", *SIGNATURES} <= exported
    assert all(n.startswith("hs_") for n in exported), "only our C interface is visible"


def test_kernel_runs_call_the_library_as_the_runtime_does() -> None:
    """Neither may import the other, so both say what its functions take."""
    assert {"hs_abi": (ctypes.c_int, ()), **SIGNATURES} == native_run._SIGNATURES


def test_needs_only_libc() -> None:
    listing = subprocess.run(
        ["objdump", "-p", build_cpu("portable", CACHE)], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split()[1] for line in listing.splitlines() if "NEEDED" in line}
    assert all(n.startswith(("libc.", "libm.", "ld-linux", "libpthread.")) for n in needed), needed


def test_rebuild_elsewhere_is_byte_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_cpu("portable", CACHE).read_bytes()
    copy = tmp_path / "other place" / "cpu"
    shutil.copytree(toolchain.SOURCES, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(toolchain, "SOURCES", copy)
    second = build_cpu("portable", tmp_path / "cache")
    assert second.read_bytes() == first
    assert sorted(p.name for p in second.parent.iterdir()) == [second.name, f"{second.name}.sha256"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels with a base are x86's")
def test_levels_share_objects_and_are_those_built_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "cpu"
    sources.mkdir()
    body = (
        'extern "C" __attribute__((visibility("default"))) float hs_%s(float x) { return x * x; }'
    )
    for name in ("linear", "other"):
        (sources / f"{name}.cpp").write_text(body % name)
    monkeypatch.setattr(toolchain, "SOURCES", sources)
    compiled, run = [], toolchain._run

    def counted(command: list[str], cwd: Path | None = None) -> str:
        compiled.extend(command[command.index("-c") + 1 :][:1] if "-c" in command else ())
        return run(command, cwd)

    monkeypatch.setattr(toolchain, "_run", counted)
    names = [v.name for v in CPU_LEVELS]
    together = build_levels(names, tmp_path / "together")
    assert sorted(compiled) == ["linear.cpp"] * 5 + ["other.cpp"] * 3
    for name, path in zip(names, together, strict=True):
        assert path.name == f"headstart-{name}.so"
        assert path.read_bytes() == build_cpu(name, tmp_path / "alone").read_bytes()


def test_levels() -> None:
    assert CPU_LEVELS[0].requires == () and CPU_LEVELS[0].flags == ()
    for lower, higher in itertools.pairwise(CPU_LEVELS):
        assert set(lower.requires) < set(higher.requires)
    assert [v.name for v in machine_levels("aarch64")] == ["portable"]
    assert "portable" in [v.name for v in supported_levels()]
    with pytest.raises(ToolchainError, match="valid levels are portable"):
        build_cpu("sse9", CACHE)


def macros(flags: tuple[str, ...]) -> set[str]:
    command = [find_compiler(), *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    defined = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[1] for line in defined.splitlines()}


def text_of(source: str, seen: set[str]) -> str:
    """A source with all of our headers that it includes."""
    seen.add(source)
    text = (toolchain.SOURCES / source).read_text()
    found = set(re.findall(r'#include "(.+?)"', text)) - seen
    return text + "".join(text_of(name, seen) for name in found - seen)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels with a base are x86's")
@pytest.mark.parametrize("of", [v for v in CPU_LEVELS if v.base], ids=lambda v: v.name)
def test_shared_objects_know_nothing_of_what_a_level_adds(of: Level) -> None:
    assert of.base is not None
    added = macros(of.flags) - macros(level(of.base).flags)
    assert added
    sources = {p.name for p in toolchain.SOURCES.glob("*.cpp")}
    for source in sorted(sources):
        names = set(re.findall(r"\w+", text_of(source, set())))
        assert bool(names & added) == (source in of.own), (source, names & added)


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="install one"):
        build_cpu("portable", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolchainError, match="CXX=no-such-compiler"):
        build_cpu("portable", tmp_path)


def test_compiler_refusal_carries_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = tmp_path / "cpu"
    sources.mkdir()
    (sources / "bad.cpp").write_text("int f() { return undeclared_name; }\n")
    monkeypatch.setattr(toolchain, "SOURCES", sources)
    with pytest.raises(ToolchainError, match="undeclared_name"):
        build_cpu("portable", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("**/*.so")), "nothing half-built is published"


def test_cxx_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "fake-c++"
    fake.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo "fake 1.0";;'
        f' *) exec {find_compiler()} "$@";; esac\n'
    )
    fake.chmod(0o755)
    sources = tmp_path / "cpu"
    sources.mkdir()
    (sources / "one.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int hs_one() { return 1; }\n'
    )
    monkeypatch.setattr(toolchain, "SOURCES", sources)
    plain = build_cpu("portable", tmp_path / "cache")
    monkeypatch.setenv("CXX", str(fake))
    other = build_cpu("portable", tmp_path / "cache")
    assert plain.parent != other.parent


class Builder:
    def __init__(self, content: bytes = b"binary") -> None:
        self.calls, self.content = 0, content

    def __call__(self, path: Path) -> None:
        self.calls += 1
        path.write_bytes(self.content)


def test_cache_builds_once(tmp_path: Path) -> None:
    build = Builder()
    path = cached(tmp_path, "k", "lib.so", build)
    assert path.read_bytes() == b"binary"
    assert cached(tmp_path, "k", "lib.so", build) == path and build.calls == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "digest"])
def test_damaged_entry_is_set_aside_and_rebuilt_once(tmp_path: Path, damage: str) -> None:
    build = Builder()
    path = cached(tmp_path, "k", "lib.so", build)
    digest = path.with_name("lib.so.sha256")
    if damage == "flip":
        path.write_bytes(b"binarz")
    elif damage == "truncate":
        path.write_bytes(b"")
    elif damage == "remove":
        path.unlink()
    else:
        digest.write_text("0" * 64)
    assert cached(tmp_path, "k", "lib.so", build).read_bytes() == b"binary"
    assert build.calls == 2
    assert len(list((tmp_path / "damaged").iterdir())) == 1


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(path: Path) -> None:
        path.write_bytes(b"half")
        raise ToolchainError("stopped")

    with pytest.raises(ToolchainError):
        cached(tmp_path / "cache", "k", "lib.so", build)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_quicker_process_wins(tmp_path: Path) -> None:
    def build(path: Path) -> None:
        cached(tmp_path, "k", "lib.so", Builder(b"theirs"))
        path.write_bytes(b"ours")

    assert cached(tmp_path, "k", "lib.so", build).read_bytes() == b"theirs"


def test_unreliable_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.cache._sound", lambda entry, filename: False)
    with pytest.raises(DamagedBuild, match="choose another cache directory"):
        cached(tmp_path, "k", "lib.so", Builder())


def test_key_is_unambiguous() -> None:
    assert key_of({"a": "bc"}) != key_of({"ab": "c"})
    assert key_of({"a": "1", "b": "2"}) == key_of({"b": "2", "a": "1"})
    assert key_of({"a": "x\x00b\x001\x00y"}) != key_of({"a": "x", "b": "y"})
