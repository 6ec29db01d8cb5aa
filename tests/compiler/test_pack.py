"""Publishing: atomic, durable names, races, left-overs of dead compiles."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compiler.errors import NoSpace, UsageError
from compiler.pack import STALE_SECONDS, TEMPORARY, Package, remove, remove_stale
from runtime.artifact import Artifact, Manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tiny_artifact: Path) -> Artifact:
    return Artifact.open(tiny_artifact)


def fill(package: Package, source: Artifact) -> Manifest:
    """The files of a real artifact, written again."""
    for entry in source.manifest.files:
        with package.create(entry.path, entry.role) as file:
            file.write((source.path / entry.path).read_bytes())
    assert sorted(package.files, key=lambda e: e.path) == list(source.manifest.files)
    return source.manifest


def visible(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if not path.name.startswith("."))


def test_published_files_are_read_only_and_sound(source: Artifact, tmp_path: Path) -> None:
    with Package(tmp_path, "tiny") as package:
        assert visible(tmp_path) == []
        path = package.publish(fill(package, source))
    assert visible(tmp_path) == [path] and list(tmp_path.iterdir()) == [path]
    assert path.name == source.path.name
    Artifact.open(path).verify()
    for entry in [path, *path.rglob("*")]:
        assert entry.stat().st_mode & 0o777 == (0o555 if entry.is_dir() else 0o444)


def test_the_loser_of_a_race_uses_the_winners_copy(source: Artifact, tmp_path: Path) -> None:
    with Package(tmp_path, "tiny") as one, Package(tmp_path, "tiny") as two:
        manifest = fill(one, source)
        fill(two, source)
        winner = one.publish(manifest)
        inode = winner.stat().st_ino
        assert two.publish(manifest) == winner
    assert winner.stat().st_ino == inode and list(tmp_path.iterdir()) == [winner]


def test_a_damaged_artifact_in_the_way_is_set_aside(source: Artifact, tmp_path: Path) -> None:
    with Package(tmp_path, "tiny") as package:
        path = package.publish(fill(package, source))
    tokenizer = path / "text" / "tokenizer.json"
    tokenizer.chmod(0o644)
    tokenizer.write_bytes(b"?" * tokenizer.stat().st_size)
    with Package(tmp_path, "tiny") as package:
        assert package.publish(fill(package, source)) == path
    Artifact.open(path).verify()
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(".damaged-")]) == 1


def test_an_error_leaves_nothing(source: Artifact, tmp_path: Path) -> None:
    with pytest.raises(KeyError), Package(tmp_path, "tiny") as package:
        fill(package, source)
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match="no space left") as error, Package(tmp_path, "tiny"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.exit_code == 6 and list(tmp_path.iterdir()) == []


def test_stale_directories_of_the_dead_are_removed(tmp_path: Path) -> None:
    old = time.time() - STALE_SECONDS - 60
    names = {}
    for name in ("dead", "alive", "young"):
        path = names[name] = tmp_path / f"{TEMPORARY}x-{name}"
        (path / "weights").mkdir(parents=True)
        (path / "weights" / "w").write_bytes(b"x")
        if name != "young":
            os.utime(path, (old, old))
    lock = os.open(names["alive"], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    remove_stale(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        p.name for p in (names["alive"], names["young"])
    )
    os.close(lock)


def test_remove_takes_a_published_artifact(source: Artifact, tmp_path: Path) -> None:
    with Package(tmp_path, "tiny") as package:
        path = package.publish(fill(package, source))
    remove(path)
    assert list(tmp_path.iterdir()) == []


PUBLISH = """
import sys
from pathlib import Path
from compiler.pack import Package
from runtime.artifact import Artifact
source = Artifact.open(sys.argv[1])
print("start", flush=True)
while True:
    with Package(Path(sys.argv[2]), "tiny") as package:
        for entry in source.manifest.files:
            with package.create(entry.path, entry.role) as file:
                file.write((source.path / entry.path).read_bytes())
        path = package.publish(source.manifest)
    path.rename(Path(sys.argv[2]) / f".taken-{path.stat().st_ino}")
"""


def test_kill_at_any_moment_shows_no_partial_artifact(source: Artifact, tmp_path: Path) -> None:
    """Whatever moment the publisher dies at, what is visible is complete."""
    for round_ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(source.path), str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None and child.stdout.readline() == b"start\n"
        time.sleep(0.003 * round_)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for path in visible(tmp_path):
            Artifact.open(path).verify()
            path.rename(tmp_path / f".seen-{round_}")


def test_a_place_that_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"out=.*file/here: cannot be written"):
        Package(tmp_path / "file" / "here", "tiny").__enter__()
