"""A content-addressed store of built binaries, shared by compiles on one machine.

In: a key (everything the build depends on) and a function that builds into a path. Out: the path of
a complete, checked file. Entries appear by rename, so a reader never sees a partial one; a damaged
entry is set aside and built again once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


class DamagedBuild(Exception):
    """A fresh build does not read back as it was written."""

    exit_code = 6


def key_of(parts: dict[str, str | bytes]) -> str:
    """Digest of named parts, unambiguous whatever they contain."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        part = parts[name]
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def cached(root: Path, key: str, filename: str, build: Callable[[Path], None]) -> Path:
    """`root/<key>/<filename>`, built by `build(path)` if it is not there or damaged."""
    entry = root / key
    if entry.exists() and not _sound(entry, filename):
        _quarantine(root, entry)
    if not entry.exists():
        _publish(root, entry, filename, build)
    if not _sound(entry, filename):
        raise DamagedBuild(
            f"{entry / filename} does not have the digest recorded when it was written: the "
            f"disk under the cache is unreliable; choose another cache directory"
        )
    return entry / filename


def _sound(entry: Path, filename: str) -> bool:
    binary, digest = entry / filename, entry / f"{filename}.sha256"
    if not binary.is_file() or not digest.is_file():
        return False
    return hashlib.sha256(binary.read_bytes()).hexdigest() == digest.read_text(
        "ascii", errors="replace"
    )


def _quarantine(root: Path, entry: Path) -> None:
    """Out of the way, kept for a look at what happened."""
    place = root / "damaged"
    place.mkdir(parents=True, exist_ok=True)
    target = Path(tempfile.mkdtemp(prefix=f"{entry.name[:16]}-", dir=place))
    try:
        os.rename(entry, target / "entry")
    except FileNotFoundError:
        target.rmdir()  # another process was quicker


def _publish(root: Path, entry: Path, filename: str, build: Callable[[Path], None]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=root))
    try:
        binary = work / filename
        build(binary)
        (work / f"{filename}.sha256").write_text(
            hashlib.sha256(binary.read_bytes()).hexdigest(), "ascii"
        )
        try:
            os.rename(work, entry)
        except OSError:
            if not entry.exists():
                raise
            # Another process published the same key first; its entry is as good as ours.
    finally:
        shutil.rmtree(work, ignore_errors=True)
