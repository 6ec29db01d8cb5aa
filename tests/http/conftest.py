"""One artifact for all HTTP tests, one server for those that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ServerProcess, serving
from toy_artifact import write_artifact


@pytest.fixture(scope="session")
def toy_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def server(toy_artifact: Path) -> Iterator[ServerProcess]:
    with serving(toy_artifact) as process:
        yield process
        assert process.process.poll() is None, (process.process.poll(), process.lines[-30:])
        bugs = [line for line in process.lines if '"trace"' in line or "Traceback" in line]
        assert not bugs, bugs[0]
        assert process.info()["restarts"] == 0
