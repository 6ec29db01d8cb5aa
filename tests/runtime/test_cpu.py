"""The CPU session: what it refuses to open, and that batches, chunks and overlap change no greedy
token.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest

from runtime.artifact import PARAM_ADDRESS, Artifact
from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.device import cpu, native
from runtime.device.arena import Arena, kv_pages
from runtime.device.base import check_trust, open_session
from runtime.device.cpu import CpuSession
from runtime.device.machine import available_memory, cores, cpu_features, cpus
from runtime.device.staging import PlanIo, arena_sizes, relocate
from runtime.errors import DamagedArtifact, IncompatibleTarget, NoSpace, UsageError
from runtime.request import Request, SamplingParams


@pytest.fixture(scope="module")
def artifact(tiny_artifact: Path) -> Artifact:
    return Artifact.open(tiny_artifact)


def generate(artifact: Artifact, prompts: list[list[int]], **options: object) -> list[list[int]]:
    session = open_session(artifact, threads=1, kv_tokens=options.pop("kv_tokens", 4096))  # type: ignore[arg-type]
    given = {"waiting_requests": 1000, "queue_wait_s": None, "request_s": None, **options}
    loop = EngineLoop(session, EngineOptions(artifact=str(artifact.path), **given), eos=())  # type: ignore[arg-type]
    tokens: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    sampling = SamplingParams(max_new_tokens=12, temperature=0)
    for i, prompt in enumerate(prompts):
        loop.add(Request(id=i, tokens=prompt, sampling=sampling))
    while loop.has_work:
        for event in loop.step():
            tokens[event.id] += event.tokens
    loop.idle()
    loop.close()
    return list(tokens.values())


def test_every_artifact_gets_its_own_library(artifact: Artifact) -> None:
    library = native.choose_library(artifact)
    first, second = (native.open_library(artifact, library) for _ in range(2))
    assert first._handle != second._handle  # two artifacts may hold different code


def test_greedy_tokens_do_not_depend_on_batch_chunk_overlap_or_preemption(
    artifact: Artifact,
) -> None:
    rng = np.random.default_rng(0)
    vocab = artifact.manifest.model.vocab
    prompts = [rng.integers(0, vocab, size).tolist() for size in (3, 17, 40, 64, 90, 33)]
    alone = [generate(artifact, [p], prefix_cache=False)[0] for p in prompts]
    assert generate(artifact, prompts) == alone
    assert generate(artifact, prompts, overlap=False) == alone
    assert generate(artifact, prompts, max_step_tokens=7, max_running=5) == alone
    assert generate(artifact, prompts, kv_tokens=160) == alone


def damaged(artifact: Artifact, tmp_path: Path, name: str, at: int) -> Artifact:
    """A copy with one bit of one file flipped, opened: L0 does not read that far."""
    copy = tmp_path / artifact.path.name
    shutil.copytree(artifact.path, copy)
    path = copy / name
    for p in (copy, path.parent, path):
        os.chmod(p, 0o755)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    return Artifact.open(copy)


def test_a_flipped_weight_is_refused_by_name(artifact: Artifact, tmp_path: Path) -> None:
    tensor = artifact.manifest.tensors[0][-1]
    _, start = artifact.weights_data(0)
    bad = damaged(artifact, tmp_path, "weights/rank0.safetensors", start + tensor.offset + 5)
    with pytest.raises(DamagedArtifact, match=r"rank0\.safetensors.*") as refused:
        CpuSession(bad, threads=1)
    assert tensor.name in str(refused.value)


@pytest.mark.parametrize("role", ["library", "library of other machines", "plan"])
def test_a_flipped_byte_of_code_or_plan_is_refused(
    artifact: Artifact, tmp_path: Path, role: str
) -> None:
    library = native.choose_library(artifact).path
    plan = next(f.path for f in artifact.manifest.files if f.path.startswith("plans/"))
    others = [lib.path for lib in artifact.manifest.libraries if lib.path != library]
    name = {"library": library, "plan": plan}.get(role) or others[0]
    bad = damaged(artifact, tmp_path, name, 100)
    with pytest.raises(DamagedArtifact) as refused:
        CpuSession(bad, threads=1)
    assert name in str(refused.value)


@pytest.mark.parametrize("step", ["_load_weights", "_instantiate"])
def test_a_session_that_fails_to_open_leaves_no_threads(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before, during = os.listdir("/proc/self/task"), []
    done = getattr(CpuSession, step)

    def fail(*args: object) -> None:
        done(*args)
        during.append(len(os.listdir("/proc/self/task")))
        raise NoSpace("no room")

    monkeypatch.setattr(CpuSession, step, fail)
    with pytest.raises(NoSpace, match="no room"):
        CpuSession(artifact, threads=1)
    assert during == [len(before) + 1]
    assert os.listdir("/proc/self/task") == before


def with_manifest(artifact: Artifact, **changes: object) -> Artifact:
    return Artifact(artifact.path, msgspec.structs.replace(artifact.manifest, **changes))


def test_foreign_machines_and_features_are_named(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = msgspec.structs.replace(artifact.manifest.target, machine="riscv")
    with pytest.raises(IncompatibleTarget, match="riscv"):
        native.choose_library(with_manifest(artifact, target=target))
    needy = tuple(
        msgspec.structs.replace(lib, requires=("warp_drive",))
        for lib in artifact.manifest.libraries
    )
    with pytest.raises(IncompatibleTarget, match="warp_drive"):
        native.choose_library(with_manifest(artifact, libraries=needy))
    monkeypatch.setattr(native, "cpu_features", lambda: frozenset())
    best = [lib for lib in artifact.manifest.libraries if not lib.requires]
    assert native.choose_library(artifact) == best[-1]


def test_abi_is_checked_before_a_plan_is_made(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "ABI", 99)
    with pytest.raises(IncompatibleTarget, match="ABI"):
        native.open_library(artifact, native.choose_library(artifact))


def test_pool_size_is_asked_for_or_bounded_and_refused_with_both_numbers(
    artifact: Artifact,
) -> None:
    m = artifact.manifest
    size, context = m.state.page_size, -(-m.model.context // m.state.page_size)
    assert kv_pages(m, 10 * size, 1 << 40) == 10
    assert kv_pages(m, None, 1 << 50) == context * m.max_seqs
    fixed = m.weights_bytes + m.state.pages_offset + m.work_bytes + m.io_bytes
    available = fixed + (context + 10) * m.state.page_bytes
    assert kv_pages(m, None, available) >= context
    with pytest.raises(NoSpace, match=r"tokens takes .* MiB are available"):
        kv_pages(m, 1 << 40, 1 << 40)
    with pytest.raises(NoSpace, match="before any KV page"):
        kv_pages(m, None, fixed // 2)
    with pytest.raises(UsageError, match="one page"):
        kv_pages(m, 1, 1 << 40)


def test_a_small_pool_shortens_the_context(artifact: Artifact) -> None:
    session = CpuSession(artifact, threads=1, kv_tokens=64)
    assert (session.capacity.context, session.capacity.pages) == (64, 4)
    session.close()
    session.close()


def test_an_address_outside_its_arena_is_refused(artifact: Artifact) -> None:
    sizes = arena_sizes(artifact.manifest, 4)
    plan = artifact.plan(0, artifact.manifest.buckets[0].name)
    params = plan.params.copy()
    params["value"][np.flatnonzero(params["kind"] == PARAM_ADDRESS)[0]] = 1 << 60
    with pytest.raises(DamagedArtifact, match="address below"):
        relocate(artifact, msgspec.structs.replace(plan, params=params), (0,) * 4, sizes)
    params = plan.params.copy()
    params["kind"][0] = 3
    with pytest.raises(IncompatibleTarget, match="kind 3"):
        relocate(artifact, msgspec.structs.replace(plan, params=params), (0,) * 4, sizes)


def test_steps_beyond_every_bucket_and_depth_are_refused(artifact: Artifact) -> None:
    from test_null import good

    session = CpuSession(artifact, threads=1, kv_tokens=1024)
    wide = replace(good(), pages=np.zeros((2, 10_000), np.int32))
    with pytest.raises(ValueError, match="no plan for"):
        session.submit(wide)
    first, second = session.submit(good()), session.submit(good())
    with pytest.raises(ValueError, match="in flight"):
        session.submit(good())
    with pytest.raises(ValueError, match="oldest"):
        session.collect(second)
    one, two = session.collect(first), session.collect(second)
    assert one.token.tolist() == two.token.tolist()
    session.close()


def test_state_costs_nothing_until_used() -> None:
    arena = Arena(1 << 33)
    before = available_memory()
    assert not arena.bytes[: 1 << 20].any()
    assert before - available_memory() < 1 << 30


def test_threads_are_cores_and_never_more_than_cpus() -> None:
    assert cpu.choose_threads(None) == cores() <= cpus() == len(os.sched_getaffinity(0))
    with pytest.raises(UsageError, match="threads"):
        cpu.choose_threads(cpus() + 1)
    assert cpu_features()


def test_an_artifact_of_another_user_needs_its_digest(artifact: Artifact) -> None:
    check_trust(artifact, None)
    check_trust(artifact, artifact.digest)
    with pytest.raises(UsageError, match="not this artifact's digest"):
        check_trust(artifact, "0" * 64)
    foreign = Mock(digest=artifact.digest)
    foreign.path.stat.return_value.st_uid = os.getuid() + 1
    with pytest.raises(UsageError, match=f"trust_artifact={artifact.digest}"):
        check_trust(foreign, None)
    check_trust(foreign, artifact.digest)


def test_a_profile_counts_every_node_of_every_step(artifact: Artifact) -> None:
    session = open_session(artifact, threads=1, kv_tokens=4096)
    assert isinstance(session, CpuSession)
    loop = EngineLoop(session, EngineOptions(artifact=str(artifact.path)), eos=())
    sampling = SamplingParams(max_new_tokens=110, ignore_eos=True)
    loop.add(Request(id=0, tokens=[1, 2, 3], sampling=sampling))
    with session.profiling() as read:
        assert all(of.steps == of.total == of.nodes.sum() == 0 for of in read().values())
        for _ in range(100):
            loop.step()  # with overlap, one step is in flight
        ran = [of for of in read().values() if of.steps]
        assert sum(of.steps for of in ran) == 100
        for of in ran:
            assert (of.nodes > 0).all()
            assert of.total / 2 < of.nodes.sum() <= of.total  # the rest is two small copies
        loop.step()
        last = read()
        assert sum(of.steps for of in last.values()) == 101
        assert sum(of.steps for of in ran) == 100  # a reading is a copy
    with pytest.raises(ValueError, match="1 steps are in flight"), session.profiling():
        pass
    while loop.has_work:
        loop.step()
    for name, of in read().items():
        assert (of.nodes == last[name].nodes).all()  # nobody counts any more
    loop.close()


@pytest.mark.parametrize(("option", "value"), [("gpu", 0), ("null_step_s", 0.1)])
def test_options_of_other_devices_are_refused(tiny_artifact: Path, option: str, value: float):
    with pytest.raises(UsageError, match=f"{option}={value} has no effect: .*; leave it out"):
        open_session(Artifact.open(tiny_artifact), **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [True, False])
def test_what_a_step_keeps_is_what_would_be_written(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Prompts that come late, sequences that grow over pages and end: every upload is that of
    steps which keep nothing."""
    written = []

    class Compared:
        """Fills a staging buffer and, from nothing, its shadow."""

        def __init__(self, held, plan, side) -> None:
            self.held, self.plan, self.side = held, plan, side
            self.keeps, self.take = held.keeps, held.take

        def fill(self, step):
            first, size = self.held.fill(step)
            assert self.plan.shadow.hold(self.side, step).fill(step) == (first, size)
            both = [s[self.side][first : first + size] for s in (self.plan.real, self.plan.plain)]
            np.testing.assert_array_equal(*both)
            written.append(self)
            return first, size

    class Twice(PlanIo):
        def __init__(self, header, staging, received) -> None:
            super().__init__(header, staging, received)
            plain = shadows.setdefault(id(staging), [np.zeros_like(b) for b in staging])
            self.shadow, self.plain = PlanIo(header, plain, received), plain
            self.real = staging

        def hold(self, side, step):
            return Compared(super().hold(side, step), self, side)

    shadows: dict[int, list[np.ndarray]] = {}
    monkeypatch.setattr(cpu, "PlanIo", Twice)
    session = open_session(artifact, threads=1, kv_tokens=4096)
    loop = EngineLoop(session, EngineOptions(artifact="", overlap=overlap), eos=())
    for i, most in enumerate((40, 5, 70)):
        sampling = SamplingParams(max_new_tokens=most, temperature=i / 2, ignore_eos=True)
        loop.add(Request(id=i, tokens=[1, 2, 3 + i], sampling=sampling))
        for _ in range(7):
            loop.step()
    while loop.has_work:
        loop.step()
    loop.close()
    assert sum(a is b for a, b in zip(written, written[2:], strict=False)) > 40


def test_pages_that_a_plan_has_no_columns_for_are_not_kept(artifact: Artifact) -> None:
    from test_null import good

    staging, received = ([np.zeros(artifact.manifest.io_bytes, np.uint8)] for _ in range(2))
    io = PlanIo(artifact.plan(0, artifact.manifest.buckets[-1].name).header, staging, received)
    step = replace(good(), kept=object())
    held = io.hold(0, step)
    held.fill(step)
    most = artifact.manifest.buckets[-1].pages
    assert held.keeps(replace(step, pages=np.zeros((2, most), np.int32)))
    assert not held.keeps(replace(step, pages=np.zeros((2, most + 1), np.int32)))
    assert not held.keeps(replace(step, kept=None))


def test_masks_end_with_their_step(artifact: Artifact) -> None:
    """Also where the next one keeps everything else."""
    from test_null import good

    size = artifact.manifest.io_bytes
    staging, received = ([np.zeros(size, np.uint8)] for _ in range(2))
    io = PlanIo(artifact.plan(0, artifact.manifest.buckets[-1].name).header, staging, received)
    step = replace(good(), kept=object())
    held = io.hold(0, step)
    plain = held.fill(step)
    assert held.keeps(step)
    before = staging[0].copy()
    words = -(-artifact.manifest.model.vocab // 32)
    masks = np.full((1, words), 7, np.int32)
    masked = replace(step, row_mask=np.array([-1, 0], np.int32), masks=masks)
    first, upload = held.fill(masked)
    assert first < plain[0] and first + upload == sum(plain)
    assert (staging[0] != before).any()
    assert not held.keeps(step)
    assert io.hold(0, step).fill(step) == plain
    np.testing.assert_array_equal(staging[0][plain[0] :], before[plain[0] :])
