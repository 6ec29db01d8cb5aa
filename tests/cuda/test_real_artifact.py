"""An artifact that the compiler made for a GPU, opened on the stub driver: the ABI of its cubins is
the manifest's, and every node is the plan's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cuda_stub import load
from test_cuda_session import expected_nodes

from runtime.artifact import Artifact
from runtime.device.cuda import CudaSession

SMALL = ("shape.max_seqs=4", "shape.max_tokens=64", "shape.context=64")


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "fp8dq"])
def test_a_compiled_artifact_opens(quant: str, tmp_path: Path) -> None:
    stub = load()
    stub.set("cubins", 1)
    command = [sys.executable, "-m", "compiler", "model=all-minilm-l6", "weights=random"]
    done = subprocess.run(
        [*command, f"quant={quant}", "target=h200", f"out={tmp_path}", *SMALL],
        capture_output=True,
        text=True,
        check=True,
    )
    artifact = Artifact.open(done.stdout.strip().splitlines()[-1])
    session = CudaSession(artifact, kv_tokens=256)
    session.complete()
    order = list(session.plan_seconds)
    expected = [n for name in order for n in expected_nodes(artifact, name, session._bases)]
    assert stub.named("cuGraphAddNode") == expected
    assert len(stub.named("cuLibraryLoadData")) == len(artifact.manifest.kernels)
    session.close()
    assert stub.live() == 0
