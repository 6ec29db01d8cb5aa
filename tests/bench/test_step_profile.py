"""Where a step's time goes: kinds of node and phases add up, bytes are those of the step."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from bench import step_profile
from bench.bandwidth import Bandwidth
from bench.errors import BenchUsage
from bench.static_batch import StaticBatch, step_bytes
from bench.step_profile import Laps, node_bytes, profile, profiled, table
from runtime.artifact import Artifact, node_kind
from runtime.device.null import NullSession, null_capacity


@pytest.fixture(scope="module")
def artifact(tiny_artifact: Path) -> Artifact:
    return Artifact.open(tiny_artifact)


def test_laps_leave_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Mock(perf_counter=Mock(side_effect=[10.0, 20.0, 20.5, 24.0, 24.5]))
    monkeypatch.setattr(step_profile, "time", clock)
    laps = Laps()
    laps.restart()
    laps.mark("between")
    laps.mark("schedule")
    laps.mark("between")
    assert laps.seconds == {"between": [0.5, 0.5], "schedule": [3.5]}


def test_profile_adds_up(artifact: Artifact) -> None:
    static = StaticBatch.open(artifact, threads=1)
    buffer = Bandwidth(1 << 20, profiled(static.session, artifact).call)
    try:
        given = profile(static, artifact, buffer, static.prompts(2, 20, 0), 16)
        again = static.run(static.prompts(2, 20, 1), 6)
    finally:
        buffer.close()
        static.close()
    assert given["steps"] == 15
    assert len(again.decode) == 5  # the loop goes on, unheard
    nodes, native = given["nodes"], given["native_us"]
    taken = sum(of["us"] for of in nodes.values())
    assert all(of["us"] > 0 for of in nodes.values()) and taken <= native
    assert given["between_nodes_us"] == pytest.approx(native - taken)
    phases = ["between", "schedule", "build", "submit", "collect", "commit"]
    assert sorted(given["host_us"]) == sorted(phases)
    plan = artifact.plan(0, static.session._plans[0].bucket.name)
    assert list(nodes) == list(dict.fromkeys(map(node_kind, plan.header.labels)))
    assert sum(of["nodes"] for of in nodes.values()) == len(plan.nodes)
    lines = table(given)
    assert [line.split("  ")[1] for line in lines[2 : 2 + len(nodes)]] == list(nodes)
    assert "15 decode steps" in lines[0]


@pytest.mark.parametrize(("batch", "context"), [(1, 20.0), (4, 33.5)])
def test_bytes_of_the_nodes_are_those_of_the_step(
    artifact: Artifact, batch: int, context: float
) -> None:
    padding = sum(t.size for t in artifact.manifest.tensors[0] if t.name.startswith("pad."))
    for bucket in artifact.manifest.buckets:
        read = node_bytes(artifact, artifact.plan(0, bucket.name), batch, context)
        assert sum(read) == pytest.approx(step_bytes(artifact, batch, context) - padding)


def test_a_device_without_a_plan_loop_is_refused(artifact: Artifact) -> None:
    with pytest.raises(BenchUsage, match=r"profile=true.*is for cpu; leave it out"):
        profiled(NullSession(null_capacity(artifact, None)), artifact)
