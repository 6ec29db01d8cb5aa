"""The whole compile: same bytes twice, weights linked when only text changes, kills leave nothing,
every flipped byte is refused, options that cannot work are refused in one line."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy

from compiler.errors import CompileError, NoSpace, UsageError
from compiler.pipeline import compile_model
from compiler.progress import Progress
from conf.errors import ConfigError
from conf.load import load
from conf.schema import CompileConfig
from runtime.artifact import Artifact, weights_path
from runtime.errors import DamagedArtifact

ROOT = Path(__file__).resolve().parents[2]
Compile = Callable[..., Path]


def compile_here(*overrides: str) -> Path:
    """In this process: saves the imports."""
    loaded = load(CompileConfig, "compile", overrides)
    return compile_model(loaded.config, loaded.sources, Progress(quiet=True))


def compile_(*overrides: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "compiler", *overrides], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_the_same_inputs_give_the_same_bytes(tiny_artifact: Path, tmp_path: Path) -> None:
    """Also from another directory, and with weights written instead of linked."""
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copytree(Path("~/.cache/headstart/cpu").expanduser(), cache / "cpu")
    again = Path(
        compile_("model=tiny", f"out={tmp_path}/b", f"cache={cache}").stdout.splitlines()[-1]
    )
    assert again.name == tiny_artifact.name
    assert tree(again) == tree(tiny_artifact)


def test_another_chat_template_links_the_same_weights(tiny_artifact: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    out = tiny_artifact.parent
    other = Artifact.open(
        compile_here("model=tiny", f"model.chat_template={template}", f"out={out}")
    )
    assert other.path != tiny_artifact
    assert other.text("chat_template.jinja") == template.read_bytes()
    name = weights_path(0)
    assert (other.path / name).stat().st_ino == (tiny_artifact / name).stat().st_ino


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    where = f"cache={tmp_path}/file/here"
    with pytest.raises(UsageError, match=r"cache=.*file/here: cannot be written"):
        compile_here("model=hf", "model.source=/no/such/model", f"out={tmp_path}", where)


def test_manifest_tells_what_was_compiled(tiny_artifact: Path) -> None:
    manifest = Artifact.open(tiny_artifact).manifest
    assert manifest.name == manifest.model.name == "tiny"
    assert manifest.config["dtype"] == manifest.dtype != "auto"
    assert manifest.provenance["model.name"].startswith("conf/model/tiny.yaml")
    assert "out" not in manifest.config and "cache" not in manifest.config
    assert [b.tokens for b in manifest.buckets] == [1, 8, manifest.max_seqs, manifest.max_tokens]
    steps = manifest.report["steps"]
    assert steps["t1"]["launches"] == 5 * manifest.model.layers + 5
    assert steps["t1"]["read"] < steps["t8"]["read"]
    assert manifest.source and all(len(digest) == 64 for digest in manifest.source.values())


def test_stored_weights_stand_for_the_checkpoint(tiny_artifact: Path) -> None:
    """One matrix and one vector found in the file as their layout says."""
    from compiler.checkpoint import Checkpoint
    from compiler.hub import locate
    from kernels.cpu import layout

    artifact = Artifact.open(tiny_artifact)
    stored = safetensors.numpy.load_file(tiny_artifact / weights_path(0))
    checkpoint = Checkpoint.open(locate("package:tiny", None))
    down = checkpoint.tensor("model.layers.0.mlp.down_proj.weight")
    norm = checkpoint.tensor("model.norm.weight")
    from compiler.weights import stored as as_stored

    expected = layout.pack_linear(artifact.manifest.dtype, as_stored(down, artifact.manifest.dtype))
    assert (stored["layers.0.down.data"] == expected["data"]).all()
    assert (stored["final_norm.data"] == norm.float().numpy()).all()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantization_records_its_error_and_the_gate_refuses(
    scheme: str, compile_artifact: Compile, tmp_path: Path
) -> None:
    accuracy = Artifact.open(compile_artifact("model=tiny", f"quant={scheme}")).manifest.accuracy
    low, high = {"int8": (0.0005, 0.05), "int4": (0.01, 0.6)}[scheme]
    assert low < accuracy["logit_error"] < high
    limit = f"accuracy.max_delta={accuracy['logit_error'] / 2}"
    with pytest.raises(CompileError, match=r"exceeds accuracy\.max_delta"):
        compile_here("model=tiny", f"quant={scheme}", limit, f"out={tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_float32_moves_nothing(compile_artifact: Compile) -> None:
    artifact = Artifact.open(compile_artifact("model=tiny", "dtype=float32"))
    assert artifact.manifest.accuracy["logit_error"] == 0.0


def test_what_cannot_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match="target memory"):
        compile_here("model=llama3.1-405b", "weights=random", f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_flipped_bytes_are_refused_with_the_file_named(tiny_artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / tiny_artifact.name
    shutil.copytree(tiny_artifact, copy)
    rng = random.Random(0)
    for file in sorted(p for p in copy.rglob("*") if p.is_file()):
        file.parent.chmod(0o755)
        file.chmod(0o644)
        with file.open("r+b") as stream:
            size = file.stat().st_size
            for offset in [0, size - 1, *(rng.randrange(size) for _ in range(4))]:
                stream.seek(offset)
                byte = stream.read(1)[0]
                stream.seek(offset)
                stream.write(bytes([byte ^ 1 << rng.randrange(8)]))
                stream.flush()
                with pytest.raises(DamagedArtifact) as error:
                    Artifact.open(copy).verify()
                assert str(file.relative_to(copy)) in str(error.value)
                stream.seek(offset)
                stream.write(bytes([byte]))
                stream.flush()
    Artifact.open(copy).verify()


def test_every_weight_byte_is_under_a_checksum(tiny_artifact: Path) -> None:
    """What L1 checks while loading covers the whole data section, padding too."""
    import google_crc32c

    artifact = Artifact.open(tiny_artifact)
    path, start = artifact.weights_data(0)
    data = path.read_bytes()[start:]
    tensors = artifact.manifest.tensors[0]
    assert sum(t.size for t in tensors) == len(data)
    crcs = [google_crc32c.value(data[t.offset : t.offset + t.size]) for t in tensors]
    artifact.check_crcs(0, crcs)


def test_kills_leave_no_partial_artifact(tiny_artifact: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-m", "compiler", "model=tiny", f"out={tmp_path}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stderr is not None
        for line in child.stderr:  # past the imports: kill between design and publish
            if line.startswith("design"):
                break
        time.sleep(rng.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.stderr.close()
        child.wait()
        for path in tmp_path.iterdir():
            if not path.name.startswith("."):
                Artifact.open(path).verify()
                assert path.name == tiny_artifact.name


def test_output_is_one_path_on_stdout(tmp_path: Path) -> None:
    done = compile_("model=tiny", f"out={tmp_path}")
    assert Path(done.stdout.strip()).is_dir() and len(done.stdout.splitlines()) == 1
    assert "fit " in done.stderr and "publish" in done.stderr


def test_random_weights_depend_on_the_seed(tmp_path: Path) -> None:
    paths = [
        compile_here("model=tiny", "weights=random", f"seed={seed}", f"out={tmp_path}")
        for seed in (0, 1)
    ]
    one, two = (Artifact.open(path).manifest for path in paths)
    assert one.tensors != two.tensors


def test_a_compile_may_leave_out_the_reference(tmp_path: Path) -> None:
    artifact = Artifact.open(
        compile_here("model=tiny", "accuracy.measure=false", f"out={tmp_path}")
    )
    assert artifact.manifest.accuracy == {} and artifact.manifest.golden == ()
    with pytest.raises(ConfigError, match=r"max_delta=1 with accuracy\.measure=false"):
        compile_here("model=tiny", "accuracy.measure=false", "accuracy.max_delta=1")
