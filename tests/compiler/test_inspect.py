"""show, diff and verify on real artifacts, in process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from compiler import inspect
from compiler.verify import GOLDEN_TOKENS, golden_session, golden_tokens
from runtime.artifact import Artifact, digest, encode_manifest
from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.request import Request, SamplingParams


def test_show(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["show", str(tiny_artifact)]) == 0
    text = capsys.readouterr().out
    manifest = Artifact.open(tiny_artifact).manifest
    assert tiny_artifact.name in text and f"vocabulary {manifest.model.vocab}" in text
    assert all(entry.path in text for entry in manifest.files)


def test_show_program_and_plan(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["show", str(tiny_artifact), "--program", "--plan", "t8"]) == 0
    text = capsys.readouterr().out
    layers = Artifact.open(tiny_artifact).manifest.model.layers
    assert text.count(" = linear_rope_kv(") == layers  # program
    assert text.count("\nlinear_rope_kv 0.") == 1  # plan
    assert "weights+0" in text


def test_an_unknown_bucket_is_no_damage(
    tiny_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect.main(["show", str(tiny_artifact), "--plan", "t9"]) == 2
    assert "--plan t9: the buckets are t1, t8" in capsys.readouterr().err


def test_diff(
    tiny_artifact: Path, compile_artifact: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect.main(["diff", str(tiny_artifact), str(tiny_artifact)]) == 0
    assert capsys.readouterr().out == "equal\n"
    other = compile_artifact("model=tiny", "quant=int8")
    assert inspect.main(["diff", str(tiny_artifact), str(other)]) == 1
    text = capsys.readouterr().out
    assert "quant.scheme: none | int8" in text and "files.text/tokenizer.json" not in text
    assert "tensors: " in text


def test_verify(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["verify", str(tiny_artifact)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "files",
        "plans",
        "tokens",
    ]


def test_records_are_of_gpus(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["verify", str(tiny_artifact), "--records", "here"]) == 2
    assert "--records here: tuning records are of GPUs" in capsys.readouterr().err


def test_verify_says_when_no_tokens_were_recorded(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a compile for a GPU on a machine without one; no session is opened then."""
    assert inspect.main(["verify", str(edited(tiny_artifact, tmp_path / "a", golden=()))]) == 0
    assert "tokens     none recorded" in capsys.readouterr().out


def test_golden_tokens_do_not_depend_on_the_batch(tiny_artifact: Path) -> None:
    artifact = Artifact.open(tiny_artifact)
    session = golden_session(artifact)
    for golden in artifact.manifest.golden:
        assert golden_tokens(session, [list(golden.prompt)]) == (golden,)
    session.close()


def test_golden_tokens_are_those_that_the_engine_gives(tiny_artifact: Path) -> None:
    artifact = Artifact.open(tiny_artifact)
    loop = EngineLoop(golden_session(artifact), EngineOptions(artifact=""), eos=())
    want = {i: golden for i, golden in enumerate(artifact.manifest.golden)}
    got: dict[int, list[int]] = {i: [] for i in want}
    for i, golden in want.items():
        sampling = SamplingParams(max_new_tokens=GOLDEN_TOKENS, temperature=0)
        loop.add(Request(id=i, tokens=list(golden.prompt), sampling=sampling))
    while loop.has_work:
        for event in loop.step():
            got[event.id] += event.tokens
    loop.close()
    assert got == {i: list(golden.tokens) for i, golden in want.items()}
    assert len(got) == 2 and all(len(set(tokens)) > 2 for tokens in got.values())


def edited(path: Path, root: Path, **changes: object) -> Path:
    """A copy with other manifest fields, renamed so that its digest is right again."""
    copy = root / path.name
    shutil.copytree(path, copy)
    copy.chmod(0o755)
    manifest = msgspec.structs.replace(Artifact.open(copy).manifest, **changes)
    (copy / "manifest.json").chmod(0o644)
    (copy / "manifest.json").write_bytes(encode_manifest(manifest))
    return copy.rename(root / f"tiny-{digest(encode_manifest(manifest))}")


def test_verify_notices_wrong_tokens_and_wrong_plans(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Artifact.open(tiny_artifact).manifest
    first = manifest.golden[0]
    wrong = msgspec.structs.replace(first, tokens=(*first.tokens[:-1], first.tokens[-1] ^ 1))
    path = edited(tiny_artifact, tmp_path / "a", golden=(wrong, *manifest.golden[1:]))
    assert inspect.main(["verify", str(path)]) == 4
    assert "golden prompt" in capsys.readouterr().err
    config = {**manifest.config, "shape": {**manifest.config["shape"], "context": 999}}
    path = edited(tiny_artifact, tmp_path / "b", config=config)
    assert inspect.main(["verify", str(path)]) == 4
    assert "plans/rank0.t1.plan" in capsys.readouterr().err


def test_damage_is_reported_with_its_exit_code(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect.main(["show", str(tmp_path / "none")]) == 2
    copy = tmp_path / tiny_artifact.name
    shutil.copytree(tiny_artifact, copy)
    library = next((copy / "code").iterdir())
    library.chmod(0o644)
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 4
    library.write_bytes(data)
    assert inspect.main(["show", str(copy)]) == 0
    assert inspect.main(["verify", str(copy)]) == 4
    assert f"code/{library.name}" in capsys.readouterr().err
