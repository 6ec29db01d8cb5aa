"""The option surface: every YAML composes and resolves; every kind of mistake is one line with
exit code 2.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from conf.bench_schema import LatencyConfig
from conf.errors import ConfigError
from conf.load import load, run
from conf.options import CONF, group_choices, help_text
from conf.resolve import (
    FP8_SCHEMES,
    GPU_FIELDS,
    GPU_TARGETS,
    check_supported,
    resolve,
    settle_target,
)
from conf.schema import CompileConfig, KvConfig, ServeConfig
from kernels.ops.kv import KV_DTYPES

GROUPS = ("model", "quant", "parallel", "kv", "target", "shape")
CHOICES = [(group, choice) for group in GROUPS for choice in group_choices(group)]
REFUSED = {("quant", "fp8"), ("quant", "fp8dq"), ("parallel", "tp2")}


def compose(*overrides: str) -> CompileConfig:
    return load(CompileConfig, "compile", overrides).config


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_group_file_composes_and_resolves(group: str, choice: str) -> None:
    overrides = ["model=tiny"] if group != "model" else []
    overrides += ["model.source=/some/dir"] if (group, choice) == ("model", "hf") else []
    loaded = load(CompileConfig, "compile", [f"{group}={choice}", *overrides])
    if (group, choice) in REFUSED:
        with pytest.raises(ConfigError, match=f"{group}.*{choice[-1]}"):
            check_supported(loaded.config, loaded.sources)
        return
    resolved, origin = resolve(
        loaded.config, loaded.sources, checkpoint_dtype="bfloat16", context=1 << 20
    )
    assert "auto" not in (
        resolved.dtype,
        resolved.kv.dtype,
        resolved.target.kind,
        resolved.target.name,
        resolved.shape.context,
    )
    assert resolved.name
    assert all(origin.values())


def test_all_groups_of_the_defaults_list_are_tested() -> None:
    assert {p.name for p in CONF.iterdir() if p.is_dir() and any(p.glob("*.yaml"))} >= set(GROUPS)
    assert {f.name for f in fields(CompileConfig)} >= set(GROUPS)


@pytest.mark.parametrize(
    ("gpus", "name"),
    [((), "cpu"), (("NVIDIA A100",), "cpu"), (("NVIDIA A100", "NVIDIA H200"), "h200")],
)
def test_auto_is_the_gpu_of_this_machine_or_its_cpu(gpus: tuple[str, ...], name: str) -> None:
    loaded = load(CompileConfig, "compile", ["model=tiny", "quant=none"])
    config, origin = settle_target(loaded.config, loaded.sources, gpus)
    assert config.target == compose("model=tiny", f"target={name}").target
    assert origin["target.name"] == origin["target.kind"] == "this machine"
    assert loaded.config.target.kind == "auto"
    named = compose("model=tiny", "target=cpu")
    assert settle_target(named, {}, ("NVIDIA H200",))[0].target.name == "cpu"


def test_every_gpu_that_auto_may_choose_has_a_target() -> None:
    assert set(GPU_TARGETS) == set(group_choices("target")) - {"auto", "cpu"}


GPU_WORDS = [f"target.{key}={'sm_90a' if key == 'arch' else 80}" for key in GPU_FIELDS]
SHAPE = ["model=llama3-8b", "weights=random"]
IDLE = [
    *(
        ("quant.group_size=64", ["model=tiny", f"quant={scheme}", "target=h200"])
        for scheme in ("none", *FP8_SCHEMES)
    ),
    ("quant.head=false", ["model=tiny"]),
    ("seed=7", ["model=tiny"]),
    ("model.source=/models/mine", SHAPE),
    ("model.revision=v1", SHAPE),
    *((w, ["model=tiny", f"target={target}"]) for target in ("auto", "cpu") for w in GPU_WORDS),
]


@pytest.mark.parametrize(("word", "beside"), IDLE, ids=str)
def test_an_option_that_would_change_nothing_is_refused(word: str, beside: list[str]) -> None:
    loaded = load(CompileConfig, "compile", [*beside, word])
    with pytest.raises(ConfigError, match=rf"^{word}(\.0)?: .*; leave it out or take \w+=\w+"):
        resolve(loaded.config, loaded.sources, checkpoint_dtype="float32", context=128)


def test_what_changes_something_is_not_refused() -> None:
    words = ["model=llama3-8b", "weights=random", "seed=7", "quant=int8", "quant.head=false"]
    loaded = load(CompileConfig, "compile", [*words, "quant.group_size=64", "target=h200"])
    check_supported(loaded.config, loaded.sources)


def test_resolution_of_auto_and_its_sources() -> None:
    loaded = load(CompileConfig, "compile", ["model=qwen3-8b", "quant=int4", "kv.page_size=16"])
    config, origin = resolve(
        loaded.config, loaded.sources, checkpoint_dtype="float16", context=40960
    )
    assert (config.dtype, config.kv.dtype, config.shape.context) == ("float32", "float32", 8192)
    assert (config.name, config.target.kind) == ("qwen3-8b", "cpu")
    assert origin["quant.group_size"] == "conf/quant/int4.yaml"
    assert origin["model.config.hidden_size"] == "conf/model/qwen3-8b.yaml"
    assert origin["kv.page_size"] == "override"
    assert origin["quant.head"] == "default"
    assert origin["kv.dtype"] == "dtype"
    assert "float16" in origin["dtype"] and "40960" in origin["shape.context"]
    assert loaded.config.dtype == "auto", "the composed config is left as it was"


def test_every_kind_of_page_is_a_choice() -> None:
    """What the op contracts store, the schema takes and a file of the group names."""
    (field,) = (f for f in fields(KvConfig) if f.name == "dtype")
    assert set(field.metadata["choices"]) == {"auto", *KV_DTYPES}
    named = {compose("model=tiny", f"kv={name}").kv.dtype for name in group_choices("kv")}
    assert named == {"auto", *KV_DTYPES}


def test_context_beyond_the_model_is_refused() -> None:
    loaded = load(CompileConfig, "compile", ["model=tiny", "shape.context=4096"])
    with pytest.raises(ConfigError, match=r"4096.*2048"):
        resolve(loaded.config, loaded.sources, checkpoint_dtype="float32", context=2048)


@pytest.mark.parametrize("name", ["a/b", ".hidden", "..", "two words"])
def test_a_name_that_is_no_directory_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"name={name}"):
        check_supported(compose("model=tiny", f"name='{name}'"), {})


def test_name_of_a_local_model() -> None:
    config = compose("model=hf", "model.source=/models/My-Model/")
    resolved, _ = resolve(config, {}, checkpoint_dtype="float32", context=128)
    assert resolved.name == "my-model"


def test_dict_entries_can_be_added_and_changed() -> None:
    config = compose("model=llama3-8b", "model.config.num_hidden_layers=2", "model.config.new=1")
    assert config.model.config["num_hidden_layers"] == 2
    assert config.model.config["new"] == 1
    assert config.model.config["hidden_size"] == 4096


MISTAKES = [
    ((), "missing value: model=", "tiny"),
    (("model=hf",), "missing value: model.source", ""),
    (("model=tinny",), "model=tinny", "did you mean tiny?"),
    (("model=tiny", "quant=itn8"), "quant=itn8", "did you mean int8?"),
    (("model=tiny", "quan=int8"), "unknown option quan", "did you mean quant?"),
    (("model=tiny", "shape.max_seq=1"), "unknown option shape.max_seq", "shape.max_seqs"),
    (("model=tiny", "shape.max_seqs=many"), "shape.max_seqs=many", "whole number"),
    (("model=tiny", "shape.max_seqs=1.5"), "shape.max_seqs=1.5", "whole number"),
    (("model=tiny", "shape.max_seqs=0"), "shape.max_seqs=0", "1 to 4096"),
    (("model=tiny", "quant.head=perhaps"), "quant.head=perhaps", "true or false"),
    (("model=tiny", "dtype=fp16"), "dtype=fp16", "float32"),
    (("model=tiny", "dtype=null"), "dtype=null", "choices: auto"),
    (("model=tiny", "weights=rand"), "weights=rand", "random"),
    (("model=tiny", "kv=int8"), "kv=int8", "bf16"),
    (("model=tiny", "quant=int8,int4"), "several values", "-m"),
    (("model=tiny", "accuracy=strict"), "accuracy", "group"),
    (("model=tiny", "+quant.bits=3"), "unknown option quant.bits", "quant.scheme"),
    (("model=tiny", "~quant"), "quant", "~"),
    (("model=tiny", "name.first=x"), "name.first", "name"),
    (("model=tiny", "verbose"), "verbose", "key=value"),
    (("model=tiny", "--verbose"), "--verbose", "-m"),
    (("model=tiny", "name=a=b"), "name=a=b", "quote"),
    (("model=tiny", "seed=[1"), "seed=[1", "quote"),
]


@pytest.mark.parametrize(("overrides", "named", "remedy"), MISTAKES, ids=lambda v: str(v)[:40])
def test_mistakes_are_one_line_and_exit_code_2(
    overrides: tuple[str, ...], named: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(config: CompileConfig, sources: object) -> None:
        raise AssertionError("main must not run")

    assert run(CompileConfig, "compile", never, overrides) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert named in said.err and remedy in said.err


def test_sweep_runs_every_point_and_keeps_the_first_failure() -> None:
    seen: list[tuple[str, str]] = []

    class Refused(Exception):
        exit_code = 3

    def main(config: CompileConfig, sources: object) -> int:
        seen.append((config.quant.scheme, config.kv.dtype))
        if config.quant.scheme == "int8":
            raise Refused("no")
        return 0

    assert (
        run(CompileConfig, "compile", main, ["-m", "model=tiny", "quant=int8,int4", "kv=bf16,auto"])
        == 3
    )
    assert seen == [("int8", "bfloat16"), ("int8", "auto"), ("int4", "bfloat16"), ("int4", "auto")]


def test_a_bug_keeps_its_traceback() -> None:
    def main(config: ServeConfig, sources: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(ServeConfig, "serve", main, ["artifact=x"])


def test_an_interrupt_ends_the_sweep_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[str] = []

    def main(config: ServeConfig, sources: object) -> None:
        seen.append(config.artifact)
        raise KeyboardInterrupt

    assert run(ServeConfig, "serve", main, ["-m", "artifact=x,y"]) == 130
    assert seen == ["x"] and "Traceback" not in capsys.readouterr().err


def test_serve_options() -> None:
    loaded = load(ServeConfig, "serve", ["artifact=a/b-1", "port=0", "limits.n=4", "overlap=false"])
    assert (loaded.config.artifact, loaded.config.port) == ("a/b-1", 0)
    assert (loaded.config.limits.n, loaded.config.overlap) == (4, False)
    assert loaded.sources["port"] == "override" and loaded.sources["host"] == "default"
    for wrong in ("port=65536", "policy=best", "artefact=x", "limits.nn=1", "drain_s=-1"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            load(ServeConfig, "serve", ["artifact=x", wrong])
    with pytest.raises(ConfigError, match="artifact"):
        load(ServeConfig, "serve")


def test_a_limit_of_null_is_none_and_known_as_such() -> None:
    loaded = load(ServeConfig, "serve", ["artifact=x", "limits.n=null", "limits.request_s=null"])
    assert loaded.config.limits.lifted() == ["request_s", "n"]
    assert loaded.config.limits.waiting_requests is None
    assert load(ServeConfig, "serve", ["artifact=x"]).config.limits.lifted() == []
    for wrong in ("limits.n=0", "limits.request_s=-1", "log_level=loud"):
        with pytest.raises(ConfigError, match=wrong):
            load(ServeConfig, "serve", ["artifact=x", wrong])


def test_one_value_is_a_list_of_one() -> None:
    def batch(given: str) -> list[int]:
        loaded = load(LatencyConfig, "bench/latency", ["artifact=x", f"batch={given}"])
        return loaded.config.batch

    assert batch("8") == [8]
    assert batch("[1,8]") == [1, 8]
    with pytest.raises(ConfigError, match="batch"):
        batch("x")


def test_help_says_what_options_mean_and_their_defaults() -> None:
    text = help_text(LatencyConfig, "bench/latency")
    assert "batch=  a list like [1,2]  [[1]]" in text
    assert "`runs`: measured runs of each" in text
    assert "dataclasses" not in text + help_text(CompileConfig, "compile")


def test_help_and_cfg(capsys: pytest.CaptureFixture[str]) -> None:
    def never(config: CompileConfig, sources: object) -> None:
        raise AssertionError("main must not run")

    assert run(CompileConfig, "compile", never, ["--help"]) == 0
    text = capsys.readouterr().out
    assert "smollm-135m" in text and "shape.max_seqs=" in text
    assert run(CompileConfig, "compile", never, ["--cfg", "model=tiny", "quant=int4"]) == 0
    assert "scheme: int4" in capsys.readouterr().out
    assert run(CompileConfig, "compile", never, ["--cfg", "job", "model=tiny"]) == 0
    assert "name: tiny" in capsys.readouterr().out


def test_nothing_is_written_and_any_directory_works(tmp_path: Path) -> None:
    code = (
        "import sys; from conf.load import run; from conf.schema import CompileConfig\n"
        "sys.exit(run(CompileConfig, 'compile', lambda c, s: print(c.quant.scheme)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", "model=tiny", "quant=int8,int4"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(CONF.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["int8", "int4"]
    assert list(tmp_path.iterdir()) == []


def test_composing_imports_no_framework() -> None:
    code = (
        "import sys; from conf.load import load; from conf.schema import ServeConfig\n"
        "load(ServeConfig, 'serve', ['artifact=x']); print(len(sys.modules))\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 500
