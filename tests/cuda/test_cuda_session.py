"""The CUDA session on the stub driver: what it asks of the driver is what the plan says, what it
computes with is what steps say, and whatever fails leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import toy_cuda
from cuda_stub import NO_DEVICE, OUT_OF_MEMORY, Stub, load

from runtime.artifact import ARENAS, Artifact, LaunchPlan
from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.device import crc32c, gpu_weights
from runtime.device.base import StepInput, open_session
from runtime.device.cuda import CudaSession
from runtime.device.gpu_memory import WISHED
from runtime.device.staging import DEPTH, arena_sizes, demand
from runtime.errors import DamagedArtifact, HeadstartError, IncompatibleTarget, UsageError
from runtime.request import Request, SamplingParams

KV_TOKENS = 256


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    pytest.importorskip("cuda.bindings")
    return toy_cuda.write(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = load()
    toy_cuda.register(stub)
    yield stub
    assert stub.live() == 0, "objects of the driver were left behind"


def opened(artifact: Artifact) -> CudaSession:
    session = CudaSession(artifact, kv_tokens=KV_TOKENS)
    session.complete()
    return session


def step(tokens: list[int], seqs: int = 1) -> StepInput:
    """`tokens` of one sequence, or one each of `seqs`; a logit row per sequence."""
    n = len(tokens)
    floats = np.zeros(seqs, np.float32)
    ints = np.zeros(seqs, np.int32)
    starts = np.arange(seqs + 1) if n == seqs else np.array([0, n])
    return StepInput(
        tokens=np.array(tokens, np.int32),
        positions=np.arange(n, dtype=np.int32),
        kv_slots=np.arange(n, dtype=np.int32),
        seq_start=starts.astype(np.int32),
        seq_len=np.full(seqs, max(n // seqs, 1), np.int32),
        pages=np.zeros((seqs, 1), np.int32),
        row_token=(starts[1:] - 1).astype(np.int32),
        row_slot=np.arange(seqs, dtype=np.int32),
        row_target=np.full(seqs, -1, np.int32),
        row_flags=ints,
        row_top=ints,
        temperature=floats,
        top_k=ints,
        top_p=floats,
        min_p=floats,
        frequency=floats,
        presence=floats,
        repetition=floats,
        seed=np.zeros(seqs, np.int64),
        edits=np.zeros((0, 4), np.int32),
    )


# --- what the driver is asked -------------------------------------------------------------------


def expected_nodes(artifact: Artifact, bucket: str, bases: tuple[int, ...]) -> list[list[str]]:
    """cuGraphAddNode's arguments, worked out from the plan node by node."""
    plan = artifact.plan(0, bucket)
    kernels = {k.path: k for k in artifact.manifest.kernels}
    out = []
    for index, node in enumerate(plan.nodes):
        kernel = kernels[plan.header.kernels[node["kernel"]].file]
        values = []
        first = int(node["first_param"])
        for param, declared in zip(plan.params[first:], kernel.parameters, strict=False):
            value = int(param["value"])
            if declared.kind == "tensormap":
                map = plan.header.tensormaps[param["aux"]]
                words = [bases[map.arena] + map.offset, map.element_type, 2, map.swizzle]
                words += [*reversed(map.shape), 0, 0, 0, *reversed(map.box), 0, 0, 0, 0, 0]
                values.append(struct.pack("<16Q", *words).hex())
            else:
                if param["kind"] == 1:
                    value += bases[param["arena"]]
                values.append(value.to_bytes(declared.size, "little").hex())
        edge = "none" if index == 0 else "1:1:0" if node["flags"] & 1 else "0:0:0"
        sizes = [*node["grid"], *node["block"], node["shared"]]
        out.append([kernel.entry, *map_str(sizes), edge, ",".join(values)])
    return out


def map_str(values: list) -> list[str]:
    return [str(int(v)) for v in values]


@pytest.mark.parametrize("wishes", [True, False])
def test_every_node_edge_and_parameter_byte_is_the_plans(
    artifact: Artifact, stub: Stub, wishes: bool
) -> None:
    stub.set("wishes", wishes)
    session = opened(artifact)
    bases = session._bases
    if wishes:
        assert bases == tuple(WISHED[name] for name in ARENAS)
    else:
        assert not set(bases) & set(WISHED.values())
    added = stub.named("cuGraphAddNode")
    order = ["m16", "d1", "d4", "m8"]  # serves all, then decode from small on, then the rest
    expected = [node for name in order for node in expected_nodes(artifact, name, bases)]
    assert added == expected
    assert stub.named("cuGraphInstantiate") == [["3", "0"]] * 4
    cluster = artifact.manifest.kernels[1]
    attribute = ["tile_kernel", "4", "2", "1", "1"]  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    assert stub.named("cuGraphKernelNodeSetAttribute") == [attribute] * 4
    # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, once, where more than 48 KiB are needed
    assert stub.named("cuFuncSetAttribute") == [["tile_kernel", "8", str(cluster.shared)]]
    maps = stub.named("cuTensorMapEncodeTiled")
    address = str(bases[0] + 256)
    assert maps == [["9", "2", address, "64,32", "128", "64,16", "1,1", "0", "3", "2", "0"]] * 4
    assert len(stub.named("cuLibraryLoadData")) == 2
    session.close()


def test_order_of_calls(artifact: Artifact, stub: Stub) -> None:
    """Checks come first; code is asked for its attributes before graphs are made; every graph is
    uploaded after it is made."""
    session = opened(artifact)
    names = [call[0] for call in stub.calls]
    first = {name: names.index(name) for name in names}
    checks = ("cuInit", "cuDeviceGetCount", "cuDeviceGetAttribute", "cuDriverGetVersion")
    assert max(first[c] for c in checks) < first["cuDevicePrimaryCtxRetain"]
    assert first["cuMemGetInfo"] < first["cuMemAddressReserve"]
    arena = ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemRelease", "cuMemSetAccess"]
    calls = [name for name in names if name in arena]
    assert calls == arena * len(ARENAS)
    assert first["cuFuncSetAttribute"] < first["cuGraphInstantiate"] < first["cuGraphUpload"]
    assert names.count("cuGraphUpload") == len(artifact.manifest.buckets)
    session.close()
    closing = [call[0] for call in stub.calls][len(names) :]
    assert closing.index("cuStreamSynchronize") < closing.index("cuGraphExecDestroy")
    assert closing.index("cuGraphExecDestroy") < closing.index("cuLibraryUnload")
    assert closing[-1] == "cuDevicePrimaryCtxRelease"
    session.close()  # nothing more
    assert len(stub.calls) == len(names) + len(closing)


def read(address: int, size: int) -> np.ndarray:
    """Device memory, which the stub keeps where the address says."""
    return np.frombuffer(ctypes.string_at(address, size), np.uint8)


def test_arenas_hold_weights_and_zeros(artifact: Artifact, stub: Stub) -> None:
    session = opened(artifact)
    weights, state, work, io = session._bases
    manifest = artifact.manifest
    data = b"".join(array.tobytes() for _, array in toy_cuda.weights())
    assert read(weights, len(data)).tobytes() == data
    assert not read(state, manifest.state.pages_offset).any()
    assert not read(work, manifest.counters_bytes).any()
    assert read(work, manifest.work_bytes)[manifest.counters_bytes :].any(), "the rest is not ours"
    assert not read(io, manifest.io_bytes).any()
    pages = KV_TOKENS // manifest.state.page_size
    assert session.capacity.pages == pages
    reserved = [int(call[0]) for call in stub.named("cuMemAddressReserve")]
    assert all(r >= s for r, s in zip(reserved, arena_sizes(manifest, pages), strict=True))
    session.close()


def test_a_step_is_one_upload_one_launch_one_download(artifact: Artifact, stub: Stub) -> None:
    session = opened(artifact)
    before = len(stub.calls)
    ticket = session.submit(step([5]))
    names = [call[0] for call in stub.calls[before:]]
    assert names == [
        *("cuEventRecord", "cuMemcpyHtoDAsync", "cuGraphLaunch", "cuMemcpyDtoHAsync"),
        "cuEventRecord",
    ]
    io, upload, _ = toy_cuda.io_fields(toy_cuda.BUCKETS[0])
    live, edits = (next(f.offset for f in io if f.name == name) for name in ("live", "edits"))
    base = session._bases[ARENAS.index("io")]
    assert stub.named("cuMemcpyHtoDAsync")[-1] == [str(base + live), str(edits - live)]
    size = max(f.offset for f in io) + 4 * toy_cuda.TOP - upload
    start, length = stub.named("cuMemcpyDtoHAsync")[-1]
    assert int(start) == base + upload and int(length) >= size
    session.collect(ticket)
    edited = replace(step([5]), edits=np.ones((3, 4), np.int32))
    session.collect(session.submit(edited))
    assert stub.named("cuMemcpyHtoDAsync")[-1] == [str(base + live), str(edits - live + 48)]
    session.close()


def test_masks_of_constrained_rows_alone_are_uploaded(artifact: Artifact, stub: Stub) -> None:
    """They end where the other inputs begin; a step's index is turned into the table's."""
    session = opened(artifact)
    bucket = next(b for b in toy_cuda.BUCKETS if b.name == "d4")
    io, _, _ = toy_cuda.io_fields(bucket)
    at = {f.name: f.offset for f in io}
    words = -(-toy_cuda.VOCAB // 32)
    masks = np.arange(2 * words, dtype=np.int32).reshape(2, words)
    row_mask = np.array([-1, 1, 0], np.int32)
    given = replace(step([5, 6, 7], seqs=3), row_mask=row_mask, masks=masks)
    session.collect(session.submit(given))
    base = session._bases[ARENAS.index("io")]
    first = 2 * words * 4  # of the table's four rows, two are in use
    assert at["masks"] == 0 and at["live"] >= 4 * words * 4
    assert stub.named("cuMemcpyHtoDAsync")[-1] == [str(base + first), str(at["edits"] - first)]
    device = np.ctypeslib.as_array(ctypes.cast(base, ctypes.POINTER(ctypes.c_int32)), (4096,))
    np.testing.assert_array_equal(device[2 * words : 4 * words].reshape(2, words), masks)
    placed = device[at["row_mask"] // 4 :][:3]
    assert placed.tolist() == [-1, 3, 2]
    session.close()


# --- what steps give ----------------------------------------------------------------------------


def echo(stub: Stub) -> list[str]:
    """Kernels that run: token[r] = tokens[r] + 1; the entries launched are listed."""
    ran: list[str] = []

    def run(entry: bytes, params: object, grid: object) -> None:
        ran.append(entry.decode())
        if entry == b"echo_kernel":
            live, tokens, out = (
                ctypes.cast(params[i], ctypes.POINTER(ctypes.c_uint64))[0]  # type: ignore[index]
                for i in range(3)
            )
            count = ctypes.cast(live, ctypes.POINTER(ctypes.c_int32))[2]
            source, target = (ctypes.cast(a, ctypes.POINTER(ctypes.c_int32)) for a in (tokens, out))
            for row in range(count):
                target[row] = source[row] + 1

    stub.hook(run)
    return ran


def test_steps_in_flight_keep_their_inputs_and_results(artifact: Artifact, stub: Stub) -> None:
    ran = echo(stub)
    session = opened(artifact)
    first = session.submit(step([10]))
    second = session.submit(step([20, 30, 40], seqs=3))
    with pytest.raises(ValueError, match=f"holds {DEPTH}"):
        session.submit(step([1]))
    with pytest.raises(ValueError, match="not the oldest"):
        session.collect(second)
    out = session.collect(first)
    assert out.token.tolist() == [11] and out.seconds > 0
    third = session.submit(step([7]))
    assert session.collect(second).token.tolist() == [21, 31, 41]
    assert session.collect(third).token.tolist() == [8]
    assert ran == ["echo_kernel", "tile_kernel", "echo_kernel"] * 3
    with pytest.raises(ValueError, match="no plan for 17 tokens"):
        session.submit(step(list(range(17))))
    session.close()


def test_the_engine_serves_from_it(artifact: Artifact, stub: Stub) -> None:
    """Scheduler, chunks and overlap above the session; the device continues tokens of its own."""
    echo(stub)
    session = open_session(artifact, kv_tokens=KV_TOKENS)
    options = EngineOptions(artifact=str(artifact.path), overlap=False)
    loop = EngineLoop(session, options, eos=())
    loop.add(Request(id=1, tokens=[3], sampling=SamplingParams(max_new_tokens=4, temperature=0)))
    tokens: list[int] = []
    while loop.has_work:
        for event in loop.step():
            assert event.finish is None or event.finish.reason == "length"
            tokens += event.tokens
    assert len(tokens) == 4 and tokens[0] == 4
    loop.close()


def test_another_thread_may_drive_and_close_a_session(artifact: Artifact, stub: Stub) -> None:
    from concurrent.futures import ThreadPoolExecutor

    echo(stub)
    session = opened(artifact)
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(lambda: session.collect(session.submit(step([1])))).result()
        assert out.token.tolist() == [2]
        pool.submit(session.close).result()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Plans after the first two are made once it is set."""
    gate = threading.Event()
    real = Artifact.plan

    def slow(self: Artifact, rank: int, bucket: str) -> LaunchPlan:
        if bucket in ("d4", "m8"):
            gate.wait(30)
        return real(self, rank, bucket)

    monkeypatch.setattr(Artifact, "plan", slow)
    yield gate
    gate.set()


def test_a_step_takes_a_larger_plan_while_its_own_is_made(
    artifact: Artifact, stub: Stub, gate: threading.Event
) -> None:
    three = step([1, 2, 3], seqs=3)
    session = CudaSession(artifact, kv_tokens=KV_TOKENS)  # ready with m16 and d1
    assert session._plans.fitting(demand(three)).bucket.name == "m16"
    session.collect(session.submit(three))
    gate.set()
    session.complete()
    assert session._plans.fitting(demand(three)).bucket.name == "d4"
    session.close()


# --- what is refused, and that nothing is left ----------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("devices", 0, "no NVIDIA GPU is visible"),
        ("capability", 80, r"compiled for sm_90a, GPU 0 \(Stub\) has compute capability 8\.0"),
        ("capability", 100, r"compute capability 10\.0"),
        ("driver", 12020, r"driver of CUDA 12\.4, found 12\.2"),
        ("shared", 99_999, "takes 100000 bytes of shared memory"),
        ("free", 1 << 20, "before any KV page"),
        ("free", (512 << 20) + (24 << 20), "lower kv_tokens"),
    ],
)
def test_unfit_machines_are_refused_before_anything_is_loaded(
    artifact: Artifact, stub: Stub, setting: str, value: int, message: str
) -> None:
    stub.set(setting, value)
    with pytest.raises(IncompatibleTarget, match=message) as refused:
        CudaSession(artifact, kv_tokens=1 << 20)
    assert refused.value.exit_code == 3
    names = {call[0] for call in stub.calls}
    assert not names & {"cuMemAddressReserve", "cuMemCreate", "cuLibraryLoadData"}


def test_cubins_of_cuda_13_need_its_driver(tmp_path: Path, stub: Stub) -> None:
    kernels = tuple(
        toy_cuda.CudaBinary(**{f: getattr(k, f) for f in k.__struct_fields__} | {"elf_abi": 8})
        for k in toy_cuda.KERNELS
    )
    artifact = toy_cuda.write(tmp_path, kernels=kernels)
    stub.set("driver", 12080)
    with pytest.raises(IncompatibleTarget, match=r"driver of CUDA 13\.0, found 12\.8"):
        CudaSession(artifact, kv_tokens=KV_TOKENS)
    stub.set("driver", 13000)
    opened(artifact).close()


CALLS = (
    *("cuInit", "cuDeviceGetCount", "cuDevicePrimaryCtxRetain", "cuMemGetInfo"),
    *("cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuStreamCreate"),
    *("cuEventCreate", "cuMemHostAlloc", "cuMemsetD8Async", "cuMemcpyHtoDAsync"),
    *("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuFuncSetAttribute"),
    *("cuGraphCreate", "cuGraphAddNode", "cuGraphKernelNodeSetAttribute", "cuGraphInstantiate"),
    *("cuGraphUpload", "cuTensorMapEncodeTiled"),
)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_out_of_memory_anywhere_is_told_and_frees_everything(
    artifact: Artifact, stub: Stub, call: str, nth: int
) -> None:
    stub.fail(call, nth, OUT_OF_MEMORY)
    try:
        session = CudaSession(artifact, kv_tokens=KV_TOKENS)
    except IncompatibleTarget as error:
        assert f"OUT_OF_MEMORY to {call}; free GPU memory" in str(error)
        return
    # The failing call was of a plan made after the first ones stood, or there was none.
    try:
        session.complete()
    except IncompatibleTarget as error:
        assert "OUT_OF_MEMORY" in str(error)
    else:
        assert len(stub.named(call)) < nth
    session.close()


def test_errors_of_the_driver_say_what_to_do(artifact: Artifact, stub: Stub) -> None:
    stub.fail("cuInit", 1, NO_DEVICE)
    with pytest.raises(IncompatibleTarget, match="NO_DEVICE to cuInit; run it on a machine with"):
        CudaSession(artifact)
    stub.reset()  # and no image is registered
    with pytest.raises(IncompatibleTarget, match="INVALID_IMAGE to cuLibraryLoadData; update"):
        CudaSession(artifact, kv_tokens=KV_TOKENS)
    toy_cuda.register(stub)
    session = opened(artifact)
    stub.fail("cuEventSynchronize", 1, 700)
    ticket = session.submit(step([1]))
    with pytest.raises(HeadstartError, match="ILLEGAL_ADDRESS to cuEventSynchronize") as fault:
        session.collect(ticket)
    assert fault.value.exit_code == 1, "a fault of the device, not of the machine's choice"
    session.close()


def test_a_plan_that_cannot_be_made_breaks_the_session(
    artifact: Artifact, stub: Stub, gate: threading.Event
) -> None:
    stub.fail("cuGraphInstantiate", 4, OUT_OF_MEMORY)
    session = CudaSession(artifact, kv_tokens=KV_TOKENS)
    gate.set()
    with pytest.raises(IncompatibleTarget, match="OUT_OF_MEMORY"):
        session.complete()
    with pytest.raises(IncompatibleTarget, match="OUT_OF_MEMORY"):
        session.submit(step([1]))
    session.close()


def test_kernels_of_another_abi_are_refused(tmp_path: Path, stub: Stub) -> None:
    shifted = tuple((k, o + 8, s) for k, o, s in toy_cuda.ECHO)
    kernels = (
        toy_cuda.CudaBinary(
            **{f: getattr(toy_cuda.KERNELS[0], f) for f in toy_cuda.KERNELS[0].__struct_fields__}
            | {"parameters": toy_cuda.parameters(shifted)}
        ),
        toy_cuda.KERNELS[1],
    )
    artifact = toy_cuda.write(tmp_path, kernels=kernels)
    with pytest.raises(DamagedArtifact, match=r"echo_kernel: expected parameters .*\(8, 8\)"):
        CudaSession(artifact, kv_tokens=KV_TOKENS)


def test_options_of_the_other_device_are_refused(artifact: Artifact, stub: Stub) -> None:
    with pytest.raises(UsageError, match=r"threads=2 has no effect: artifact .* is for cuda"):
        open_session(artifact, threads=2)
    with pytest.raises(IncompatibleTarget, match="gpu=3: this machine shows 1 GPU; give 0 to 0"):
        open_session(artifact, gpu=3)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [1, 3])
def test_a_flipped_bit_is_refused_by_name(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, readers: int
) -> None:
    monkeypatch.setattr(gpu_weights, "readers", lambda: readers)
    monkeypatch.setattr(gpu_weights, "CHUNK", 1 << 20)
    artifact = toy_cuda.write(tmp_path)
    opened(artifact).close()
    path, start = artifact.weights_data(0)
    tensor = artifact.manifest.tensors[0][1]
    with open(path, "r+b") as file:
        file.seek(start + tensor.offset + tensor.size - 1)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 64]))
    with pytest.raises(DamagedArtifact, match=r"large\.data: expected crc32c"):
        CudaSession(artifact, kv_tokens=KV_TOKENS)


def test_a_file_that_shrank_is_refused(tmp_path: Path, stub: Stub) -> None:
    artifact = toy_cuda.write(tmp_path)
    path, start = artifact.weights_data(0)
    os.truncate(path, start + (9 << 20))
    with pytest.raises(DamagedArtifact, match="the file ended"):
        CudaSession(artifact, kv_tokens=KV_TOKENS)


def test_joined_checksums_are_those_of_the_whole() -> None:
    data = np.random.default_rng(0).integers(0, 256, 70_001, np.uint8)
    pieces = [(0, 1), (1, 2), (2, 66_000), (66_000, 66_000), (66_000, 70_001)]
    extend = crc32c.extend()
    parts = [(extend(0, data[a:b].ctypes.data, b - a), b - a) for a, b in pieces]
    assert crc32c.join(parts) == google_crc32c.value(data.tobytes())


def test_without_a_driver_the_remedy_is_named(artifact: Artifact) -> None:
    """A process of its own, in which no stub answers for the driver."""
    code = (
        "import sys\nfrom runtime.artifact import Artifact\n"
        "from runtime.device.base import open_session\nfrom runtime.errors import HeadstartError\n"
        "try: open_session(Artifact.open(sys.argv[1]))\n"
        "except HeadstartError as e: print(e.exit_code, e)\n"
    )
    load()  # skips where there is a real driver
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("3 ") and "install the NVIDIA driver" in done.stdout
