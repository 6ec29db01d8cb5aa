"""Fixtures shared by all tiers: artifacts compiled once per test session.

Triton interprets in the test process (kernels run on CPU memory); cubins are built in workers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def compile_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`compile_artifact("model=tiny", "quant=int8")` → path; equal overrides compile once."""
    out = tmp_path_factory.mktemp("artifacts")
    done: dict[tuple[str, ...], Path] = {}

    def compile_(*overrides: str) -> Path:
        if overrides not in done:
            run = subprocess.run(
                [sys.executable, "-m", "compiler", *overrides, f"out={out}"],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, run.stderr
            done[overrides] = Path(run.stdout.splitlines()[-1])
        return done[overrides]

    return compile_


@pytest.fixture(scope="session")
def tiny_artifact(compile_artifact: Callable[..., Path]) -> Path:
    return compile_artifact("model=tiny")
