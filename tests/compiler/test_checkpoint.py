"""Checkpoints as hostile input: every lie a file can tell is refused, file and tensor named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compiler.checkpoint import INDEX, SINGLE, Checkpoint, ConfigReader
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.safetensors_file import read_entries

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(6, dtype=torch.float32).view(2, 3).to(torch.bfloat16),
    "c": torch.tensor([1.5, -2.0], dtype=torch.float16),
}


def write(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    save_file(TENSORS, tmp_path / SINGLE)
    return tmp_path


def test_reads_what_safetensors_wrote(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    assert set(checkpoint.names()) == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert checkpoint.shape(name) == tuple(expected.shape)
        assert torch.equal(checkpoint.tensor(name), expected)
        assert checkpoint.tensor(name).dtype == expected.dtype
    assert checkpoint.dtype() == "float32"
    assert set(checkpoint.digests()) == {"config.json", SINGLE}


def test_changing_a_view_leaves_the_file(directory: Path) -> None:
    before = (directory / SINGLE).read_bytes()
    Checkpoint.open(directory).tensor("a").zero_()
    assert (directory / SINGLE).read_bytes() == before


def test_unaligned_data_section(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    raw = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '  # odd header length
    assert (8 + len(raw)) % 4
    write(tmp_path / SINGLE, raw, struct.pack("<2f", 1.0, 2.0))
    assert Checkpoint.open(tmp_path).tensor("w").tolist() == [1.0, 2.0]


F32 = entry("F32", [2], 0, 8)
LIES: list[tuple[Any, int, str]] = [
    ({"w": entry("F32", [3], 0, 8)}, 8, "needs 12 bytes, offsets give 8"),
    ({"w": entry("F32", [2], 8, 0)}, 8, "needs 8 bytes, offsets give -8"),
    ({"w": entry("F32", [2], 4, 12)}, 12, "leaves a gap"),
    ({"w": F32, "x": entry("F32", [2], 4, 12)}, 12, "'x'.*overlaps"),
    ({"w": F32, "x": entry("F32", [2], 0, 8)}, 8, "overlaps"),
    ({"w": F32}, 9, "end at byte"),
    ({"w": F32}, 7, "end at byte"),
    ({"w": entry("F32", [-2], 0, 8)}, 8, "natural"),
    ({"w": entry("F32", [2.0], 0, 8)}, 8, "natural"),
    ({"w": entry("F32", [True, 2], 0, 8)}, 8, "natural"),
    ({"w": entry("F32", [1 << 62, 1 << 62], 0, 8)}, 8, "needs"),
    ({"w": entry("F32", [0], 0, 0)}, 0, "empty"),
    ({"w": entry("F31", [2], 0, 8)}, 8, "dtype 'F31'"),
    ({"w": {"dtype": "F32", "shape": [2]}}, 8, "exactly"),
    ({"w": {**F32, "stride": 1}}, 8, "exactly"),
    ({"w": 3}, 8, "exactly"),
    ({"w": {**F32, "data_offsets": [0, 4, 8]}}, 8, "natural"),
    (b'{"w":1,"w":2}', 8, "'w' stands twice"),
    (b"[1]", 0, "not a JSON object"),
    (b'{"w"', 0, "not valid JSON"),
    (b"\xff\xfe", 0, "not valid JSON"),
    (b"[" * 100000, 0, "not valid JSON"),
]


@pytest.mark.parametrize(("header", "data", "message"), LIES, ids=lambda v: str(v)[:45])
def test_lying_headers(tmp_path: Path, header: Any, data: int, message: str) -> None:
    path = write(tmp_path / SINGLE, header, bytes(data))
    with pytest.raises(DamagedCheckpoint, match=message) as caught:
        read_entries(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few"),
        (b"1234567", "too few"),
        (struct.pack("<Q", 1 << 62), "does not fit"),
        (struct.pack("<Q", 100), "does not fit"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "does not fit"),
    ],
)
def test_other_files_called_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=message):
        read_entries(tmp_path / SINGLE)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 300))
def test_any_damage_of_the_header_is_refused_or_harmless(
    directory: Path, position: int, value: int, cut: int
) -> None:
    """Never another exception, never a tensor outside the file."""
    whole = bytearray((directory / SINGLE).read_bytes())
    path = directory / "damaged.safetensors"
    whole[min(position, len(whole) - 1)] = value
    path.write_bytes(bytes(whole[: len(whole) - cut % len(whole)]))
    try:
        entries = read_entries(path)
    except DamagedCheckpoint:
        return
    assert cut % len(whole) == 0
    assert max(e.end for e in entries.values()) <= len(whole)


# --- shards ---------------------------------------------------------------------------------------


def shard(directory: Path) -> dict[str, Any]:
    (directory / SINGLE).unlink()
    save_file({"a": TENSORS["a"]}, directory / "m-1.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, directory / "m-2.safetensors")
    return {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}


def lie(change: Callable[[dict[str, Any], Path], None], message: str) -> Any:
    return pytest.param(change, message, id=message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        lie(lambda m, d: m.update(a="m-2.safetensors"), "holds tensor b|tensor a of the index"),
        lie(lambda m, d: m.update(c="m-1.safetensors"), "places in m-1.safetensors"),
        lie(lambda m, d: m.pop("c"), "places in no shard"),
        lie(lambda m, d: m.update(z="m-1.safetensors"), "tensor z of the index"),
        lie(lambda m, d: (d / "m-2.safetensors").unlink(), "m-2.safetensors: shard is missing"),
        lie(lambda m, d: m.update(a="../m-1.safetensors"), "not the name of a shard"),
        lie(lambda m, d: m.update(a="/etc/passwd"), "not the name of a shard"),
        lie(lambda m, d: m.clear(), "no weight_map"),
    ],
)
def test_lying_index(directory: Path, change: Any, message: str) -> None:
    weight_map = shard(directory)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert set(Checkpoint.open(directory).names()) == TENSORS.keys()
    change(weight_map, directory)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DamagedCheckpoint, match=message):
        Checkpoint.open(directory)


def test_pickles_are_refused_with_the_way_out(directory: Path) -> None:
    (directory / SINGLE).unlink()
    with pytest.raises(DamagedCheckpoint, match="holds neither"):
        Checkpoint.open(directory)
    (directory / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(CompileError, match=r"pytorch_model.bin.*save_pretrained"):
        Checkpoint.open(directory)


def test_missing_or_broken_config(directory: Path, tmp_path: Path) -> None:
    for content, message in ((b"{", "not valid JSON"), (b"[]", "expected a JSON object")):
        (directory / "config.json").write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=message):
            Checkpoint.open(directory)
    (directory / "config.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        Checkpoint.open(directory)
    with pytest.raises(DamagedCheckpoint, match="not a directory"):
        Checkpoint.open(tmp_path / "nowhere")


def test_other_dtypes_are_readable_only_when_unused(directory: Path) -> None:
    save_file({**TENSORS, "ids": torch.arange(3)}, directory / SINGLE)
    checkpoint = Checkpoint.open(directory)
    with pytest.raises(CompileError, match="tensor ids is I64"):
        checkpoint.tensor("ids")
    with pytest.raises(DamagedCheckpoint, match="tensor nothing is missing"):
        checkpoint.tensor("nothing")


def test_config_reader_remembers_what_was_read() -> None:
    reader = ConfigReader({"a": 1, "b": None, "c": 2.5, "d": 3, "junk": "x"}, "config.json")
    assert (reader.integer("a"), reader.number("c"), reader.number("d")) == (1, 2.5, 3.0)
    assert reader.integer("b", 7) == 7 and reader.integer("absent", 8) == 8
    with pytest.raises(CompileError, match="'junk'"):
        reader.finish()
    reader.finish(frozenset({"junk"}))
