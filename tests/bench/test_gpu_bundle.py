"""What `make gpu-bundle` takes along: wheels and built kernels."""

from __future__ import annotations

import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from bench.gpu import wheels
from bench.gpu.wheels import WheelError


def make_wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{path.name.rsplit('-', 3)[0]}.dist-info/METADATA", "\n".join(lines) + "\n\n"
        )
    return path


def test_only_what_the_machine_lacks_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing, too old, and what those need; never what is good enough. What comes with the machine
    is told where it does not, but not everything needs it."""
    monkeypatch.setattr(wheels, "wanted", lambda: ["old>=2", "gone", "here", "matplotlib"])
    made = [
        make_wheel(tmp_path, "old", "2.1", "under>=1", "far; python_version < '3'"),
        make_wheel(tmp_path, "gone", "1.0", "here>=1", "extra-one; extra == 'x'"),
        make_wheel(tmp_path, "here", "9.0"),
        make_wheel(tmp_path, "under", "1.5"),
    ]
    have = {"old": "1.0", "here": "1.0"}

    def version(name: str) -> str:
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    taken = {path.name.split("-")[0] for path in wheels.choose(made, version)}
    assert taken == {"old", "gone", "under"}
    assert "this machine does not satisfy matplotlib (not here)" in capsys.readouterr().err
    with pytest.raises(WheelError, match=r"neither .* has old>=2 \(here 1\.0\); make gpu-bundle"):
        wheels.choose(made[1:], version)


def test_a_bundle_covers_what_the_runtime_and_the_compiler_import() -> None:
    """Its list is pyproject's, walked through this environment."""
    names = wheels.closure(wheels.wanted(), wheels.needed_here, {})
    needed = {"hydra-core", "omegaconf", "antlr4-python3-runtime", "msgspec", "google-crc32c"}
    needed.add("nvidia-cutlass")
    assert needed <= set(names) and not {"torch", "triton"} & set(names)


def test_built_kernels_are_unpacked_once(tmp_path: Path) -> None:
    entry = tmp_path / "from" / "cuda" / "abc"
    entry.mkdir(parents=True)
    (entry / "kernel.bin").write_bytes(b"x")
    with tarfile.open(tmp_path / "kernels.tar.xz", "w:xz") as tar:
        tar.add(entry, arcname="cuda/abc")
    cache = tmp_path / "cache"
    assert wheels.unpack(tmp_path / "kernels.tar.xz", cache) == 1
    assert (cache / "cuda" / "abc" / "kernel.bin").read_bytes() == b"x"
    assert wheels.unpack(tmp_path / "kernels.tar.xz", cache) == 0
