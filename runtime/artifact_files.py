"""Files and manifest of an artifact directory, read without trusting what lies there.

Comes in: the artifact's root and a relative path. Goes out: a descriptor or bytes, or
DamagedArtifact in the one form all its errors have. Called by `runtime.artifact` only.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath

from runtime import weights_file
from runtime.errors import DamagedArtifact
from runtime.manifest import Manifest, plan_path, weights_path

MANIFEST = "manifest.json"
ROLES = ("weights", "binary", "data")
REMEDY = "copy the artifact again or compile it again"


def damaged(root: Path, name: str, what: str) -> DamagedArtifact:
    return DamagedArtifact(f"artifact {root}, file {name}: {what}; {REMEDY}")


def check_files(root: Path, manifest: Manifest) -> None:
    """The directory holds exactly the listed files, each a plain file of the listed size, and no
    other entry of any kind."""
    expected = {entry.path: entry.size for entry in manifest.files}
    folders = {str(parent) for path in expected for parent in PurePosixPath(path).parents} - {"."}
    found: set[str] = set()
    for name, info in _walk(root, ""):
        if stat.S_ISDIR(info.st_mode):
            if name not in folders:
                raise damaged(root, name, "expected no such folder, found one")
        elif not stat.S_ISREG(info.st_mode):
            raise damaged(
                root,
                name,
                f"expected a plain file, found {stat.filemode(info.st_mode)} (a link or a device)",
            )
        elif name != MANIFEST:
            if name not in expected:
                raise damaged(root, name, "expected no such file, found one")
            if info.st_size != expected[name]:
                raise damaged(root, name, f"expected {expected[name]} bytes, found {info.st_size}")
            found.add(name)
    if missing := sorted(set(expected) - found):
        raise damaged(root, missing[0], "expected a file, found nothing")


def _walk(root: Path, folder: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(root / folder) as entries:
        listed = sorted(entries, key=lambda e: e.name)
    for entry in listed:
        name = f"{folder}/{entry.name}" if folder else entry.name
        info = entry.stat(follow_symlinks=False)
        yield name, info
        if stat.S_ISDIR(info.st_mode):
            yield from _walk(root, name)


def open_plain(root: Path, name: str) -> BufferedReader:
    """A plain file of the artifact; links are not followed and devices not opened."""
    try:
        fd = os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise damaged(
            root, name, f"expected a readable plain file, found {error.strerror}"
        ) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise damaged(root, name, "expected a plain file, found another kind of entry")
    return os.fdopen(fd, "rb")


def read_plain(root: Path, name: str, *, limit: int, whole: bool = True) -> bytes:
    """At most `limit` bytes from the start; more in the file is an error when the `whole` is
    wanted."""
    with open_plain(root, name) as file:
        data = file.read(limit + 1 if whole else limit)
    if len(data) > limit:
        raise damaged(root, name, f"expected at most {limit} bytes, found more")
    return data


def seal(fd: int) -> None:
    fcntl.fcntl(
        fd,
        fcntl.F_ADD_SEALS,
        fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE,
    )


def check_manifest(manifest: Manifest) -> None:
    """What the rest of the runtime relies on without looking again."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise DamagedArtifact(what)

    paths = [entry.path for entry in manifest.files]
    need(len(set(paths)) == len(paths), "files: expected each path once, found one twice")
    for entry in manifest.files:
        pure = PurePosixPath(entry.path)
        plain = (
            str(pure) == entry.path
            and not pure.is_absolute()
            and ".." not in pure.parts
            and entry.path.isprintable()
        )
        need(
            plain and entry.path not in (MANIFEST, "."),
            f"files: expected a relative path, found {entry.path!r}",
        )
        need(
            entry.size >= 0 and entry.role in ROLES,
            f"files: {entry.path}: size {entry.size}, role {entry.role}",
        )
    need(
        manifest.ranks >= 1 and len(manifest.tensors) == manifest.ranks,
        f"ranks: {manifest.ranks} of {len(manifest.tensors)}",
    )
    sizes = {entry.path: entry.size for entry in manifest.files}
    for rank, tensors in enumerate(manifest.tensors):
        weights_file.check_tensors(tensors, manifest.weights_bytes)
        size = len(weights_file.header(tensors)) + manifest.weights_bytes
        need(
            sizes.get(weights_path(rank)) == size,
            f"files: {weights_path(rank)}: expected {size} bytes, found "
            f"{sizes.get(weights_path(rank))}",
        )
        for bucket in manifest.buckets:
            need(
                plan_path(rank, bucket.name) in sizes,
                f"files: expected {plan_path(rank, bucket.name)}, found no entry",
            )
    need(len(manifest.buckets) > 0, "buckets: expected at least one, found none")
    for library in manifest.libraries:
        need(
            library.path in sizes,
            f"libraries: expected {library.path} among the files, found no entry",
        )
    state = manifest.state
    counts = (
        manifest.work_bytes,
        manifest.io_bytes,
        manifest.edits,
        manifest.max_seqs,
        manifest.max_tokens,
        state.slots,
        state.page_size,
        state.page_bytes,
        state.pages_offset,
        manifest.model.context,
        manifest.model.vocab,
    )
    need(min(counts) > 0, f"sizes: expected positive ones, found {counts}")
