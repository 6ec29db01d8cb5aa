"""The artifact reader against hostile and damaged directories. No kernels, no torch: the artifact
is made by hand from the format's own types."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import weights_file
from runtime.artifact import (
    MANIFEST,
    NODE,
    PARAM,
    TOOL,
    Artifact,
    Bucket,
    CpuLibrary,
    FileEntry,
    IoField,
    KernelRef,
    LaunchPlan,
    Manifest,
    ModelInfo,
    PlanHeader,
    StateLayout,
    Target,
    TensorEntry,
    decode_manifest,
    decode_plan,
    digest,
    encode_manifest,
    encode_plan,
    node_kind,
    plan_path,
    weights_path,
)
from runtime.errors import DamagedArtifact, HeadstartError, IncompatibleTarget, UsageError

BUCKET = Bucket(name="t1", tokens=1, seqs=1, pages=2)
LIBRARY = "code/portable.so"


def small_plan() -> LaunchPlan:
    nodes = np.zeros(2, NODE)
    nodes["params"] = (2, 1)
    nodes["first_param"] = (0, 2)
    params = np.zeros(3, PARAM)
    params["kind"], params["arena"], params["value"] = 1, (0, 2, 3), (0, 64, 0)
    header = PlanHeader(
        bucket=BUCKET,
        io=(
            IoField(name="tokens", dtype="int32", shape=(1,), offset=0),
            IoField(name="token", dtype="int32", shape=(1,), offset=64, output=True),
        ),
        upload_bytes=64,
        io_bytes=128,
        kernels=(KernelRef(file="cpu", entry="hs_copy", name="copy"),),
        labels=("copy a", "copy b"),
    )
    return LaunchPlan(header=header, nodes=nodes, params=params)


def write(root: Path, **changes: object) -> Path:
    """An artifact in `root`, named by its digest."""
    rng = np.random.default_rng(0)
    arrays = [("a.data", rng.random((32, 32), np.float32)), ("n.data", rng.random(16, np.float32))]
    tensors, data = [], b""
    for name, array in arrays:
        raw = array.tobytes()
        tensors.append(
            TensorEntry(name=name, dtype="float32", shape=array.shape, offset=len(data),
                        size=len(raw), crc32c=7)
        )  # fmt: skip
        data += raw
    files = {
        weights_path(0): ("weights", weights_file.header(tensors) + data),
        LIBRARY: ("binary", b"\x7fELF" + bytes(100)),
        plan_path(0, "t1"): ("data", encode_plan(small_plan())),
        "text/tokenizer.json": ("data", b"{}"),
    }
    entries = tuple(
        FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest(), role=role)
        for path, (role, data) in sorted(files.items())
    )
    fields: dict = {
        "schema": 1,
        "tool": TOOL,
        "versions": {},
        "name": "toy",
        "model": ModelInfo(name="toy", family="llama", architectures=(), context=32, vocab=16,
                           dim=8, layers=1, parameters=9, eos_token_ids=(), bos_token_id=None),
        "target": Target(kind="cpu", machine="x86_64", levels=("portable",), abi=1),
        "dtype": "float32",
        "quant": {},
        "kv_dtype": "float32",
        "ranks": 1,
        "config": {},
        "provenance": {},
        "spec": {},
        "source": {},
        "buckets": (BUCKET,),
        "work_bytes": 64,
        "io_bytes": 128,
        "weights_bytes": len(data),
        "edits": 4,
        "max_seqs": 1,
        "max_tokens": 1,
        "state": StateLayout(slots=1, page_size=16, page_bytes=64, pages_offset=64,
                             kv_dtype="float32"),
        "libraries": (CpuLibrary(level="portable", path=LIBRARY, requires=()),),
        "files": entries,
        "tensors": (tuple(tensors),),
        "report": {},
        "accuracy": {},
    } | changes  # fmt: skip
    manifest = encode_manifest(Manifest(**fields))
    path = root / f"toy-{digest(manifest)}"
    for name, (_, data) in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    (path / MANIFEST).write_bytes(manifest)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path)


def refused(path: Path, *parts: str, kind: type[HeadstartError] = DamagedArtifact) -> None:
    with pytest.raises(kind) as error:
        Artifact.open(path).verify()
    for part in parts:
        assert part in str(error.value)


def test_a_sound_artifact_opens(path: Path) -> None:
    artifact = Artifact.open(path)
    artifact.verify()
    assert artifact.digest == path.name.removeprefix("toy-")
    assert artifact.text("tokenizer.json") == b"{}" and artifact.text("chat.jinja") is None
    plan = artifact.plan(0, "t1")
    assert plan.header == small_plan().header
    assert np.array_equal(plan.nodes, small_plan().nodes)
    assert np.array_equal(plan.params, small_plan().params)


def test_a_link_to_the_artifact_opens(path: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(path)
    assert Artifact.open(tmp_path / "latest").path == path


def test_weights_file_is_readable_safetensors_at_the_offsets_of_the_manifest(path: Path) -> None:
    artifact = Artifact.open(path)
    file, start = artifact.weights_data(0)
    arrays = safetensors.numpy.load_file(file)
    raw = file.read_bytes()
    for tensor in artifact.manifest.tensors[0]:
        data = raw[start + tensor.offset : start + tensor.offset + tensor.size]
        assert arrays[tensor.name].tobytes() == data
    assert start % 4096 == 0


def test_library_is_a_sealed_copy(path: Path) -> None:
    artifact = Artifact.open(path)
    fd = artifact.library(LIBRARY)
    (path / LIBRARY).write_bytes(b"swapped")
    assert os.pread(fd, 4, 0) == b"\x7fELF"
    with pytest.raises(OSError):
        os.pwrite(fd, b"x", 0)
    os.close(fd)
    with pytest.raises(DamagedArtifact, match="role binary"):
        artifact.library("text/tokenizer.json")
    with pytest.raises(DamagedArtifact, match=r"sha256|expected at most"):
        artifact.library(LIBRARY)


def test_every_flipped_byte_of_every_file_is_refused_with_its_name(path: Path) -> None:
    files = [p for p in path.rglob("*") if p.is_file()]
    rng = np.random.default_rng(1)
    for file in files:
        data = file.read_bytes()
        for offset in {0, len(data) - 1, *rng.integers(0, len(data), 40).tolist()}:
            damaged = bytearray(data)
            damaged[offset] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            refused(path, str(path), str(file.relative_to(path)), "expected", "found")
        file.write_bytes(data)
    Artifact.open(path).verify()


def test_flipped_header_of_the_weights_is_refused_at_open(path: Path) -> None:
    """The data section is checked per tensor while it loads; its header must be right before."""
    file = path / weights_path(0)
    data = bytearray(file.read_bytes())
    for offset in (0, 9, 60, 4000):
        data[offset] ^= 1
        file.write_bytes(data)
        with pytest.raises(DamagedArtifact, match="header"):
            Artifact.open(path)
        data[offset] ^= 1


def test_extra_missing_short_and_strange_entries_are_refused(path: Path, tmp_path: Path) -> None:
    extra = path / "text" / "extra.json"
    extra.write_text("{}")
    refused(path, "text/extra.json", "expected no such file")
    extra.unlink()
    (path / "more").mkdir()
    refused(path, "more", "folder")
    (path / "more").rmdir()
    tokenizer = path / "text" / "tokenizer.json"
    tokenizer.unlink()
    refused(path, "text/tokenizer.json", "found nothing")
    tokenizer.symlink_to(tmp_path / "elsewhere")
    refused(path, "text/tokenizer.json", "plain file")
    tokenizer.unlink()
    os.mkfifo(tokenizer)
    refused(path, "text/tokenizer.json", "plain file")
    tokenizer.unlink()
    tokenizer.write_bytes(b"{} ")
    refused(path, "text/tokenizer.json", "expected 2 bytes, found 3")


def test_a_linked_folder_is_refused(path: Path, tmp_path: Path) -> None:
    shutil.move(path / "code", tmp_path / "code")
    (path / "code").symlink_to(tmp_path / "code")
    refused(path, "code", "plain file")


def test_wrong_name_and_wrong_place(path: Path, tmp_path: Path) -> None:
    other = tmp_path / f"toy-{'0' * 64}"
    path.rename(other)
    refused(other, MANIFEST, "digest")
    refused(tmp_path / "nowhere", "found nothing", kind=UsageError)
    refused(other / MANIFEST, "found a file", kind=UsageError)
    (other / MANIFEST).unlink()
    refused(other, MANIFEST)


def renamed(path: Path, **changes: object) -> Path:
    """The manifest changed and the directory renamed after it: sound by name, wrong by content."""
    table = json.loads((path / MANIFEST).read_bytes()) | changes
    data = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    (path / MANIFEST).write_bytes(data)
    return path.rename(path.with_name(f"toy-{digest(data)}"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"ranks": 0}, "ranks"),
        ({"ranks": 2}, "ranks"),
        ({"buckets": []}, "buckets"),
        ({"buckets": [{"name": "t2", "tokens": 2, "seqs": 1, "pages": 1}]}, "t2"),
        ({"weights_bytes": 10}, "weights"),
        ({"work_bytes": -1}, "sizes"),
        ({"libraries": [{"level": "x", "path": "code/x.so", "requires": []}]}, "code/x.so"),
    ],
)
def test_manifests_that_contradict_themselves(path: Path, changes: dict, message: str) -> None:
    refused(renamed(path, **changes), MANIFEST, message)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "./a", "a/../b", "", ".", "a\nb"])
def test_paths_out_of_the_artifact_are_refused(path: Path, name: str) -> None:
    files = json.loads((path / MANIFEST).read_bytes())["files"]
    files.append({"path": name, "size": 1, "sha256": "", "role": "data"})
    refused(renamed(path, files=files), MANIFEST, "relative path")


@pytest.mark.parametrize(
    "tensor",
    [
        {"offset": -64},
        {"offset": 64},
        {"size": 1 << 62},
        {"shape": [1 << 31, 1 << 31, 1 << 31]},
        {"shape": [-1, -1]},
        {"dtype": "object"},
        {"name": "n.data"},
    ],
)
def test_tensors_that_lie_are_refused(path: Path, tensor: dict) -> None:
    tensors = json.loads((path / MANIFEST).read_bytes())["tensors"]
    tensors[0][0] |= tensor
    refused(renamed(path, tensors=tensors), MANIFEST, "tensor")


def test_another_schema_is_incompatible_not_damaged(path: Path) -> None:
    refused(renamed(path, schema=2), "expected 1, found 2", kind=IncompatibleTarget)
    assert IncompatibleTarget.exit_code == 3 and DamagedArtifact.exit_code == 4


def test_level_one_names_the_tensor(path: Path) -> None:
    artifact = Artifact.open(path)
    artifact.check_crcs(0, [7, 7])
    with pytest.raises(DamagedArtifact, match=r"n\.data.*00000007.*00000008"):
        artifact.check_crcs(0, [7, 8])
    matrix, norm = artifact.manifest.tensors[0]
    infinite, not_a_number = (np.float32([1, x]).view(np.uint8) for x in (np.inf, np.nan))
    artifact.check_finite(0, matrix, infinite)  # too large to scan, its checksum must do
    artifact.check_finite(0, norm, np.zeros(8, np.uint8))
    for part in (infinite, not_a_number):
        with pytest.raises(DamagedArtifact, match=r"n\.data: expected finite"):
            artifact.check_finite(0, norm, part)


def test_manifest_encoding_is_canonical() -> None:
    with pytest.raises(DamagedArtifact):
        decode_manifest(b"{}")
    with pytest.raises(DamagedArtifact):
        decode_manifest(b"\xff\xfe")
    with pytest.raises(DamagedArtifact):
        decode_manifest(b'{"a":' * 100_000)


def test_tool_version_is_that_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'version = "{TOOL.split()[1]}"' in text


PLAN = encode_plan(small_plan())


@settings(max_examples=300)
@given(st.integers(0, len(PLAN) - 1), st.integers(1, 255))
def test_any_damaged_plan_is_refused(offset: int, flip: int) -> None:
    data = bytearray(PLAN)
    data[offset] ^= flip
    with pytest.raises(DamagedArtifact):
        decode_plan(bytes(data))


@settings(max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused_as_a_plan(data: bytes, magic: bool) -> None:
    with pytest.raises(DamagedArtifact):
        decode_plan(PLAN[:8] + data if magic else data)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.nodes["kernel"].__setitem__(0, 1),
        lambda plan: plan.nodes["params"].__setitem__(1, 9),
        lambda plan: plan.nodes["first_param"].__setitem__(1, 0xFFFFFFFF),
        lambda plan: plan.params["arena"].__setitem__(0, 4),
        lambda plan: plan.params["kind"].__setitem__(0, 9),
        lambda plan: plan.params["kind"].__setitem__(0, 2),
    ],
)
def test_plan_indexes_out_of_their_tables_are_refused(change) -> None:
    plan = small_plan()
    change(plan)
    with pytest.raises(DamagedArtifact):
        decode_plan(encode_plan(plan))


@pytest.mark.parametrize(
    "field", [{"offset": 128}, {"shape": (1 << 62, 4)}, {"shape": (-1,)}, {"dtype": "object"}]
)
def test_io_fields_outside_the_block_are_refused(field: dict) -> None:
    plan = small_plan()
    io = (msgspec.structs.replace(plan.header.io[0], **field), plan.header.io[1])
    header = msgspec.structs.replace(plan.header, io=io)
    with pytest.raises(DamagedArtifact):
        decode_plan(encode_plan(LaunchPlan(header=header, nodes=plan.nodes, params=plan.params)))


def test_lengths_beyond_the_file_allocate_nothing() -> None:
    data = PLAN[:8] + struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF) + PLAN[20:]
    with pytest.raises(DamagedArtifact, match="expected"):
        decode_plan(data)


def test_a_kind_of_node_has_no_layer() -> None:
    assert node_kind("linear 12.qkv") == node_kind("linear 0.qkv") == "linear *.qkv"
    assert node_kind("sample token") == "sample token"
