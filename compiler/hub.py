"""`model.source` -> a local directory: a path, `package:<name>` (inside this distribution), a
Hugging Face id, or `modelscope:<id>`. Downloads go through the hubs' own libraries and caches;
without a network the cache serves. Called by `compiler.importer`.
"""

from __future__ import annotations

import re
from pathlib import Path

from compiler.errors import CompileError, HeadstartError

PACKAGED = Path(__file__).resolve().parent / "data"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What an import reads; never pickles, never code.
WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "chat_template*",
]
UNWANTED = ["consolidated*", "original/*", "onnx/*", "*.py"]


class HubError(HeadstartError):
    """A model could not be fetched."""

    exit_code = 5


def locate(source: str, revision: str | None) -> Path:
    """The directory of a model source, downloaded if it is not local."""
    if not source:
        raise CompileError("model.source=: is empty; give a directory or a hub id (owner/name)")
    if source.startswith("modelscope:"):
        return _modelscope(source.removeprefix("modelscope:"), revision)
    packaged = source.startswith("package:")
    path = PACKAGED / source.removeprefix("package:") if packaged else Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CompileError(
                f"model.revision={revision}: model.source={source} is a directory and has no "
                "revisions; leave it out"
            )
        return path
    if packaged:
        raise CompileError(f"model.source={source}: no such model in this distribution")
    if HUB_ID.fullmatch(source) is None:
        raise CompileError(
            f"model.source={source}: is neither a directory nor a hub id (owner/name); "
            "check the path"
        )
    return _huggingface(source, revision)


def _huggingface(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
        )
    except GatedRepoError:
        why = f"is gated; accept its licence at https://huggingface.co/{repo} and set HF_TOKEN"
    except RepositoryNotFoundError:
        why = "does not exist or is private; check the name or set HF_TOKEN"
    except RevisionNotFoundError:
        why = f"has no revision {revision!r}; check model.revision"
    except LocalEntryNotFoundError:
        why = (
            "is not in the cache and the hub cannot be reached; give a local directory "
            "(model.source=…), or weights=random for the shape alone"
        )
    except (HfHubHTTPError, OSError) as e:
        why = f"could not be downloaded ({str(e).splitlines()[0]}); try again"
    raise HubError(f"model.source={repo}: {why}")


def _modelscope(repo: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise CompileError(
            f"model.source=modelscope:{repo}: needs the modelscope package; "
            "pip install 'headstart[modelscope]'"
        ) from None
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
            )
        )
    except Exception as e:  # its errors have no common base across versions
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise HubError(
            f"model.source=modelscope:{repo}: could not be downloaded ({why}); "
            "check the name and model.revision"
        ) from e
