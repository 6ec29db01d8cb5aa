"""Packing: files into a directory nobody sees until it is complete, then one rename.

Comes in: files of an artifact, one by one, and at the end its manifest. Goes out: the path of the
published artifact. Called by the pipeline. A compile killed at any moment leaves at most a hidden
directory that a later compile removes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from compiler.errors import NoSpace, UsageError
from runtime.artifact import MANIFEST, Artifact, FileEntry, Manifest, digest, encode_manifest
from runtime.errors import DamagedArtifact, IncompatibleTarget

TEMPORARY = ".building-"
QUARANTINE = ".damaged-"
STALE_SECONDS = 24 * 3600


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """What the system refuses under `path` is an error in the option that named it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{option}={path}: no space left; free some") from error
        raise UsageError(
            f"{option}={path}: cannot be written ({error.strerror}); choose another directory"
        ) from error


class HashingFile:
    """What the weights writer gets: writes through and hashes on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    def entry(self, name: str, role: str) -> FileEntry:
        return FileEntry(path=name, size=self.size, sha256=self._sha256.hexdigest(), role=role)


class Package:
    """An artifact under construction. While the context is open the directory is locked, which
    tells other compiles that its owner lives; leaving the context without `publish` removes it."""

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.name = out.expanduser(), name
        self.path = self.out / f"{TEMPORARY}{name}-{secrets.token_hex(8)}"
        self.files: list[FileEntry] = []
        self._lock = -1

    def __enter__(self) -> Package:
        with writing("out", self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            remove_stale(self.out)
            self.path.mkdir(mode=0o755)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._lock)
        if self.path.exists():
            remove(self.path)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"artifact {self.name}: no space left in {self.out}; "
                "free some or choose another out="
            ) from error

    @contextmanager
    def create(self, name: str, role: str) -> Iterator[HashingFile]:
        """A new file; durable and read-only when the context ends."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            hashing = HashingFile(file)
            yield hashing
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o444)
        self.files.append(hashing.entry(name, role))

    def add(self, name: str, role: str, data: bytes) -> None:
        with self.create(name, role) as file:
            file.write(data)

    def link(self, name: str, role: str, source: Path, entry: FileEntry) -> None:
        """A published file of another artifact as a file of this one: neither is ever written
        again, so they may share bytes."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)  # another file system, or links are not allowed
            target.chmod(0o444)
        _fsync(target)
        self.files.append(FileEntry(path=name, size=entry.size, sha256=entry.sha256, role=role))

    def publish(self, manifest: Manifest) -> Path:
        """Manifest last, everything durable, rename. Another compile of the same artifact may
        have won: its copy is used."""
        data = encode_manifest(manifest)
        final = self.out / f"{self.name}-{digest(data)}"
        with (self.path / MANIFEST).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o444)
        for folder in [*(p for p in self.path.rglob("*") if p.is_dir()), self.path]:
            _fsync(folder)
            folder.chmod(0o555)
        if not _rename(self.path, final) and not _is_sound(final):
            os.rename(final, self.out / f"{QUARANTINE}{final.name}-{secrets.token_hex(4)}")
            if not _rename(self.path, final):
                Artifact.open(final)  # a third compile published meanwhile
        _fsync(self.out)
        return final


def _rename(source: Path, final: Path) -> bool:
    """False when `final` stands already."""
    try:
        os.rename(source, final)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def _is_sound(path: Path) -> bool:
    try:
        Artifact.open(path).verify()
    except (DamagedArtifact, IncompatibleTarget):
        return False
    return True


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Removal by rename, then unlink: nobody sees half of it."""
    doomed = path.with_name(f"{TEMPORARY}doomed-{secrets.token_hex(8)}")
    os.rename(path, doomed)
    for folder in [doomed, *(p for p in doomed.rglob("*") if p.is_dir())]:
        folder.chmod(0o755)
    shutil.rmtree(doomed)


def remove_stale(out: Path) -> None:
    """Temporary directories older than a day whose owner is dead: the lock of a dead owner is
    free."""
    for path in sorted(out.glob(f"{TEMPORARY}*")):
        try:
            if time.time() - path.stat().st_mtime < STALE_SECONDS:
                continue
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # another compile was faster
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # alive, or another compile was faster
        finally:
            os.close(fd)
