"""`bench.gpu` without a GPU: its processes on the stub driver, its bookkeeping, the bundle, the
peers."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from cuda_stub import environment, load

from bench.errors import BenchUsage
from bench.gpu import answers, calls, goals, peers, wheels
from bench.gpu.__main__ import line, main, run_section, summary, target_name
from bench.gpu.dlpack import DlPack
from bench.gpu.documents import merged
from bench.gpu.nodes import kind
from bench.gpu.sections import SECTIONS, Section, jobs
from bench.gpu.wheels import WheelError
from bench.peers.shape import Shape
from conf.bench_schema import GpuConfig
from kernels.ops.linear import e4m3_rows, linear_reference
from kernels.ops.samples import live
from runtime import Engine

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


def test_every_section_is_recorded_and_none_stops_another(tmp_path: Path) -> None:
    """On the stub the machine answers; what needs torch on a GPU or an artifact says why not."""
    path = tmp_path / "gpu.json"
    words = ("hardware=h200", "sections=[machine,restore,calls]", "models=[tiny]")
    done = on_stub("bench.gpu", *words, f"output_file={path}", "artifacts.tiny=/nowhere")
    assert done.returncode == 1, done.stderr
    document = json.loads(path.read_text())
    status = {r["section"]: r for r in document["sections"]}
    assert status["machine"]["figures"]["gpu"] == "Stub"
    assert {"torch", "triton", "ptxas", "nvcc"} <= set(status["machine"]["figures"]["versions"])
    assert "sees no GPU" in status["calls"]["error"]
    assert "/nowhere: expected a directory" in status["restore"]["error"]
    assert document["unmeasured"] == ["restore tiny", "calls tiny"]
    assert "not measured: restore tiny, calls tiny" in done.stdout
    assert {row["holds"] for row in document["goals"]} == {"unmeasured"}


def test_the_gpu_is_asked_for_its_name(tmp_path: Path) -> None:
    """Where the kernel driver shows none, the driver's library does."""
    done = on_stub("bench.gpu", "sections=[machine]", f"output_file={tmp_path / 'o'}")
    assert done.returncode == 2 and "no target for Stub; give hardware=" in done.stderr


def test_without_a_driver_the_machine_section_says_what_to_do(tmp_path: Path) -> None:
    load()
    words = ("hardware=h200", "sections=[machine]", "models=[]", f"output_file={tmp_path / 'o'}")
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "install the NVIDIA driver" in done.stdout


def test_time_is_bounded_by_section_and_in_all(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    config = GpuConfig(hardware="h200", seconds=0.5, models=["tiny"], output_file=str(path))
    assert main(config, {}) == 1
    document = json.loads(path.read_text())
    assert len(document["sections"]) == len(SECTIONS)
    assert all(r["status"] == "skipped" for r in document["sections"])


def test_what_a_section_found_before_its_time_was_up_counts() -> None:
    section = Section(name="slow", seconds=20, run=slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.gpu.__main__.WORKER", [sys.executable, "-c", SLOW])
        record = run_section(section, GpuConfig(), time.monotonic() + 2, "", "")
    assert record["status"] == "failed" and "over 2 s" in record["error"]
    assert record["figures"] == {"a": 2}
    assert "so far a 2" in line(record)


SLOW = """
import json, time
print(json.dumps({"a": 1}), flush=True)
print(json.dumps({"a": 2}), flush=True)
print("{", flush=True)
time.sleep(60)
"""


def slow(config: GpuConfig, model: str, artifact: str) -> dict[str, Any]:
    raise AssertionError("runs in its own process")


def test_the_order_of_the_work() -> None:
    """Correctness first; of the models the first with everything, the others compared by decode."""
    order = [(s.name, m) for s, m in jobs(GpuConfig(models=["a", "b/int8"]))]
    assert order[:4] == [("machine", ""), ("contracts", ""), ("tokens", ""), ("probes", "")]
    assert order[4:6] == [("compile", "a"), ("decode", "a")]
    of_b = [name for name, model in order if model == "b/int8"]
    assert of_b == ["compile", "decode"]
    assert order.index(("decode", "b/int8")) < order.index(("serving", "a"))


def test_names() -> None:
    assert target_name("NVIDIA H100 80GB HBM3") == "h100"
    with pytest.raises(BenchUsage, match="no target for Tesla"):
        target_name("Tesla T4")
    with pytest.raises(BenchUsage, match="sections: no 'speed'"):
        main(GpuConfig(sections=["speed"]), {})
    with pytest.raises(BenchUsage, match=r"artifacts\.x: it is none of models="):
        main(GpuConfig(artifacts={"x": "/nowhere"}), {})
    assert kind("linear 12.qkv") == "linear *.qkv"
    assert summary({"a": 1.23456, "b": {"c": 2}, "d": [1]}) == "a 1.235, b(c 2)"
    failed = {"section": "x", "model": "", "status": "failed", "error": "one\ntwo"}
    assert line(failed).endswith("two")


# --- goals and answers --------------------------------------------------------------------------


def document(**figures: dict[str, Any]) -> dict[str, Any]:
    """Of figures by `section__model`."""
    names = {"main": goals.MAIN, "small": goals.SMALL, "": ""}
    pairs = [(key.partition("__"), value) for key, value in figures.items()]
    return {
        "sections": [
            {"section": section, "model": names[model], "figures": value}
            for (section, _, model), value in pairs
        ]
    }


def test_goals_say_what_holds_and_what_is_unmeasured() -> None:
    found = document(
        decode__main={"batch_1": {"ms": 3.9, "bound_pct": 80.0}},
        peers__main={"compiled_batch_1_ms": 4.68},
        calls__main={"peak_tflops": 800.0, "prefill": [{"tflops": 500.0, "torch_tflops": 600.0}]},
        prefill__main={"tokens_1024": {"tokens": 1024, "ms": 20.0}},
        restore__main={"all_plans_s": 0.23, "plans": 23, "slowest_plan_s": 0.011},
    )
    rows = {row["goal"]: row for row in goals.reached(found)}
    assert rows["8B bf16 decode, batch 1, ms"]["holds"] == "yes"
    assert rows["8B bf16 decode, batch 1, % of bandwidth bound"]["holds"] == "no"
    ratio = rows["torch.compile with static cache / ours, batch 1"]
    assert ratio["measured"] == pytest.approx(1.2) and ratio["holds"] == "yes"
    assert rows["36 graphs restored, ms (by the mean)"]["measured"] == pytest.approx(360)
    assert rows["slowest graph restored, ms"]["measured"] == pytest.approx(11)
    assert rows["1B bf16 decode, batch 1, ms"]["holds"] == "unmeasured"
    share = rows["8B bf16 prefill of 1024 tokens, % of the measured peak"]["measured"]
    assert 85 < share < 100  # 14.6 TFLOP at 800 are 18.3 ms
    text = goals.table(list(rows.values()))
    assert len(text.splitlines()) == len(goals.GOALS) + 1 and "unmeasured" in text


def test_runs_of_one_day_are_read_as_one(tmp_path: Path) -> None:
    """The last that found something counts; another GPU's are refused."""
    runs = [
        [{"section": "a", "model": "", "figures": {"x": 1}}, {"section": "b", "model": ""}],
        [{"section": "a", "model": ""}, {"section": "b", "model": "", "figures": {"x": 2}}],
    ]
    for number, sections in enumerate(runs):
        text = json.dumps({"hardware": "h200", "sections": sections})
        (tmp_path / f"{number}.json").write_text(text)
    paths = [str(tmp_path / f"{number}.json") for number in range(2)]
    assert [r["figures"] for r in merged(paths)["sections"]] == [{"x": 1}, {"x": 2}]
    (tmp_path / "2.json").write_text('{"hardware": "h100", "sections": []}')
    with pytest.raises(BenchUsage, match="results of different GPUs"):
        merged([*paths, str(tmp_path / "2.json")])
    with pytest.raises(BenchUsage, match=r"3\.json is no result of bench\.gpu"):
        merged([str(tmp_path / "3.json")])
    for program in ("goals", "answers"):
        command = [sys.executable, "-m", f"bench.gpu.{program}", *paths]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "unmeasured" in done.stdout or "open" in done.stdout


def test_every_open_question_is_answered_in_words() -> None:
    probes = {
        "cubin_abi": {
            "driver": 13000,
            "ours": {"elf_abi": 7, "right": True},
            "newer": {"elf_abi": 8, "right": False},
        },
        "tensor_maps": {"offset": 48, "right": True},
        "programmatic_edges": {
            "programmatic_right": True, "programmatic_us_per_node": 1.0, "full_us_per_node": 2.0,
        },
        "wished_addresses": {"alone": True, "with_torch": "an error"},
        "graph_cost": {"1000_make_us_per_node": 1.0, "5000_make_us_per_node": 1.5},
        "node_updates": {"us_per_node": 0.5},
        "clusters": {"with_attribute_right": True, "without_attribute": [3]},
        "torch_views": {
            "torch": "2", "array_interface": {"aliases": True, "right": True},
            "dlpack": {"refused": "no"},
        },
        "bindings": {"cuda_bindings": "13.0.1"},
    }  # fmt: skip
    contracts = {"cases": 9, "kernels": 3, "failed": 0}
    found = answers.answers(document(probes=probes, contracts=contracts))
    assert None not in found
    assert found[0] == "ABI 7: yes, ABI 8: NO (driver 13000); 9 cases of 3 kernels, 0 wrong"
    assert found[4] == "alone: yes; with torch: NO" and "DLPack: no" in str(found[7])
    assert answers.answers({"sections": []}) == [None] * len(answers.QUESTIONS)


def test_the_open_questions_are_those_of_the_docs() -> None:
    table = answers.table([None] * len(answers.QUESTIONS))
    docs = (ROOT / "docs" / "cuda.md").read_text("utf-8")
    for row in table.splitlines()[2:]:
        number, text, _, by = (part.strip() for part in row.strip("|").split("|"))
        assert f"| {number} | {text} |" in docs and f"| {by} |" in docs


def test_torchs_product_of_codes_is_the_ops() -> None:
    """The very codes, scales and sums, to bfloat16."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 64, generator=g) * torch.logspace(-3, 2, 5)[:, None]
    w = torch.randn(48, 64, generator=g)
    codes, scale = e4m3_rows(w)
    args = {"live": live(5), "x": x, "w": codes.float() * scale[:, None]}
    want = linear_reference(args, {"scale": 1.0, "softcap": 0.0, "x_format": "fp8"})["out"]
    got = calls.scaled_mm(*e4m3_rows(x), codes, scale).float()
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-4)


def test_a_product_is_beside_torchs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls.product_seconds(3, 32, 48, "cpu", codes=True) > 0
    assert calls.scaled_mm_refuses(32, 48, "cpu") is None
    assert "40 inputs and 48 outputs" in str(calls.scaled_mm_refuses(40, 48, "cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "capability 8.0" in str(calls.scaled_mm_refuses(32, 48, "cuda"))
    monkeypatch.delattr(torch, "_scaled_mm")
    assert "has no _scaled_mm" in str(calls.scaled_mm_refuses(32, 48, "cpu"))


def test_products_are_joined_by_peer_and_rows() -> None:
    rows: list[dict[str, Any]] = [
        {"rows": 8, "over_cublas": 2.0, "over_scaled_mm": 1.0},
        {"rows": 64, "over_cublas": 0.5, "over_scaled_mm": 4.0},
        {"rows": 128, "over_cublas": 9.0},
        {"rows": 512, "over_cublas": 0.9, "no_scaled_mm": "why"},
    ]
    assert calls.over_peers(rows) == pytest.approx(
        {"few_rows_over_cublas": 1, "few_rows_over_scaled_mm": 2, "many_rows_over_cublas": 0.9}
    )


def test_probes_of_views_run_without_a_gpu() -> None:
    """The capsule is one that torch takes, over memory that it did not allocate."""
    memory = np.arange(1024, dtype=np.int32)
    view = torch.from_dlpack(DlPack(memory.ctypes.data, "cpu"))
    assert view.data_ptr() == memory.ctypes.data and view.tolist() == memory.tolist()


# --- the bundle ---------------------------------------------------------------------------------


def make_wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{path.name.rsplit('-', 3)[0]}.dist-info/METADATA", "\n".join(lines) + "\n\n"
        )
    return path


def test_only_what_the_machine_lacks_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing, too old, and what those need; never what is good enough. What comes with the machine
    is told where it does not, but not everything needs it."""
    monkeypatch.setattr(wheels, "wanted", lambda: ["old>=2", "gone", "here", "matplotlib"])
    made = [
        make_wheel(tmp_path, "old", "2.1", "under>=1", "far; python_version < '3'"),
        make_wheel(tmp_path, "gone", "1.0", "here>=1", "extra-one; extra == 'x'"),
        make_wheel(tmp_path, "here", "9.0"),
        make_wheel(tmp_path, "under", "1.5"),
    ]
    have = {"old": "1.0", "here": "1.0"}

    def version(name: str) -> str:
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    taken = {path.name.split("-")[0] for path in wheels.choose(made, version)}
    assert taken == {"old", "gone", "under"}
    assert "this machine does not satisfy matplotlib (not here)" in capsys.readouterr().err
    with pytest.raises(WheelError, match=r"neither .* has old>=2 \(here 1\.0\); make gpu-bundle"):
        wheels.choose(made[1:], version)


def test_a_bundle_covers_what_the_runtime_and_the_compiler_import() -> None:
    """Its list is pyproject's, walked through this environment."""
    names = wheels.closure(wheels.wanted(), wheels.needed_here, {})
    needed = {"hydra-core", "omegaconf", "antlr4-python3-runtime", "msgspec", "google-crc32c"}
    needed.add("nvidia-cutlass")
    assert needed <= set(names) and not {"torch", "triton"} & set(names)


def test_built_kernels_are_unpacked_once(tmp_path: Path) -> None:
    entry = tmp_path / "from" / "cuda" / "abc"
    entry.mkdir(parents=True)
    (entry / "kernel.bin").write_bytes(b"x")
    with tarfile.open(tmp_path / "kernels.tar.xz", "w:xz") as tar:
        tar.add(entry, arcname="cuda/abc")
    cache = tmp_path / "cache"
    assert wheels.unpack(tmp_path / "kernels.tar.xz", cache) == 1
    assert (cache / "cuda" / "abc" / "kernel.bin").read_bytes() == b"x"
    assert wheels.unpack(tmp_path / "kernels.tar.xz", cache) == 0


# --- the peers ----------------------------------------------------------------------------------

TOY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 80, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip


def toy_checkpoint(folder: Path, shape: Shape) -> Path:
    """A checkpoint of the toy with large weights, so that greedy tokens differ from one another."""
    folder.mkdir()
    weights = {name: array * (1 if array.ndim == 1 else 12) for name, array in toy_weights(shape)}
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TOY))
    return folder


def toy_weights(shape: Shape) -> list[tuple[str, np.ndarray]]:
    return list(shape.random_weights(3))


def test_the_peer_decodes_the_tokens_that_we_do(
    tmp_path: Path, compile_artifact: Callable[..., Path]
) -> None:
    """The same weights in float32, greedy: prefill and many steps."""
    shape = Shape.of("toy", TOY)
    source = toy_checkpoint(tmp_path / "toy", shape)
    artifact = compile_artifact("model=hf", f"model.source={source}", "dtype=float32")
    prompts = np.random.default_rng(0).integers(0, 80, (3, 9)).tolist()
    with Engine(str(artifact)) as engine:
        parameters = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
        ours = [
            result["output_ids"]
            for result in engine.generate(input_ids=prompts, sampling_params=parameters)
        ]
    model = peers.build(shape, 3, 64, device="cpu", dtype=torch.float32)
    model.load((name, array * (1 if array.ndim == 1 else 12)) for name, array in toy_weights(shape))
    tokens, seconds = peers.greedy(model, torch.tensor(prompts), 40, compile=False)
    assert tokens.tolist() == ours and len(seconds) == 39
    assert len({token for sequence in ours for token in sequence}) > 10


@pytest.mark.slow
def test_the_peers_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile and transformers' static cache, as on a GPU, on the CPU."""
    monkeypatch.setattr(Shape, "load", lambda name: Shape.of("toy", TOY))
    config = GpuConfig(torch_device="cpu", batch=[1], context=16)
    (*_, figures) = peers.peers(config, "toy")
    assert {"compiled_batch_1_ms", "transformers_batch_1_ms"} <= figures.keys(), figures


@pytest.mark.slow
def test_all_sections_run_to_the_end_on_the_stub(tmp_path: Path) -> None:
    """The whole of `make gpu` with a toy, torch on the CPU: every section is done."""
    path = tmp_path / "gpu.json"
    sizes = ["batch=[1,8]", "prefill=[64,128]", "context=64", "serving=[32,16]", "rates=[4]"]
    rest = ["load_s=1", "torch_device=cpu", "hardware=h200", "seconds=900", "verify=[]"]
    sections = [s.name for s in SECTIONS if s.name != "contracts"]  # those build for minutes
    done = on_stub(
        "bench.gpu",
        *("models=[tiny,tiny/int8]", *sizes, *rest, f"directory={tmp_path}"),
        *(f"sections=[{','.join(sections)}]", f"output_file={path}", f"bundle={tmp_path}"),
    )
    found = json.loads(path.read_text())
    assert {r["section"]: r["status"] for r in found["sections"]} == dict.fromkeys(
        sections, "done"
    ), done.stdout


@pytest.mark.slow
def test_products_of_quantized_activations_meet_torchs_on_the_stub(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    rest = ["batch=[1,8]", "prefill=[64]", "context=64", "serving=[32,16]", "torch_device=cpu"]
    done = on_stub(
        *("bench.gpu", "hardware=h200", "models=[tiny/fp8dq]", "sections=[calls]", "seconds=300"),
        *(*rest, f"directory={tmp_path}", f"output_file={path}"),
    )
    (record,) = json.loads(path.read_text())["sections"]
    assert record["status"] == "done", done.stdout
    products = record["figures"]["products"].values()
    assert products and all(("over_scaled_mm" in p) != ("no_scaled_mm" in p) for p in products)
    assert record["figures"]["few_rows_over_scaled_mm"] > 0
