"""Programs whose driver is the stub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cuda_stub import environment, load

ROOT = Path(__file__).resolve().parents[2]


def on_stub(*words: str) -> subprocess.CompletedProcess[str]:
    """A program whose driver is the stub."""
    load()  # skips where there is a real driver
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
