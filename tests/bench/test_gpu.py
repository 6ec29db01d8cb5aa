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
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from cuda_stub import environment, load

from bench.errors import BenchUsage
from bench.gpu import answers, calls, contracts, goals, peers, probes, wheels
from bench.gpu.__main__ import Run, line, main, run_section, summary, target_name
from bench.gpu.dlpack import DlPack
from bench.gpu.documents import merged
from bench.gpu.nodes import kind
from bench.gpu.sections import SECTIONS, Job, Section, jobs, limit
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
    assert document["unmeasured"] == ["calls tiny", "restore tiny"]
    assert "not measured: calls tiny, restore tiny" in done.stdout
    assert {row["holds"] for row in document["goals"]} == {"unmeasured"}


def test_the_gpu_is_asked_for_its_name(tmp_path: Path) -> None:
    """Where the kernel driver shows none, the driver's library does."""
    done = on_stub("bench.gpu", "sections=[machine]", "models=[]", f"output_file={tmp_path / 'o'}")
    assert done.returncode == 2 and "no target for Stub; give hardware=" in done.stderr


def test_without_a_driver_the_machine_section_says_what_to_do(tmp_path: Path) -> None:
    load()
    words = (
        "hardware=h200",
        "sections=[machine]",
        "models=[]",
        f"output_file={tmp_path / 'o'}",
    )
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
    assert len(document["sections"]) == len(jobs(config))
    assert all(r["status"] == "skipped" for r in document["sections"])


def test_what_a_section_found_before_its_time_was_up_counts() -> None:
    section = Section(name="slow", seconds=20, run=slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.gpu.__main__.WORKER", [sys.executable, "-c", SLOW])
        record = run_section(Job(section=section), GpuConfig(), time.monotonic() + 2, "")
        assert record["status"] == "cut" and "over 2 s" in record["error"]
        assert record["figures"] == {"a": 2}
        assert "so far a 2" in line(record)
        own = Job(section=replace(section, seconds=1))
        record = run_section(own, GpuConfig(), time.monotonic() + 20, "")
        assert record["status"] == "failed" and "over 1 s" in record["error"]


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
    order = [(j.section.name, j.model) for j in jobs(GpuConfig(models=["a", "b/int8"], tune=False))]
    assert order[:4] == [("machine", ""), ("contracts", ""), ("tokens", ""), ("probes", "")]
    assert order[4:6] == [("compile", "a"), ("decode", "a")]
    of_b = [name for name, model in order if model == "b/int8"]
    assert of_b == ["compile", "decode"]
    assert order.index(("decode", "b/int8")) < order.index(("serving", "a"))


def test_what_is_tuned_is_measured_before_and_after() -> None:
    """The first model whole, the others tuned last; without the section nothing is."""
    config = GpuConfig(models=["a", "b", "c"], artifacts={"b": "/given"}, tune_s=90)
    order = [j.name for j in jobs(config)]
    assert order[4:11] == [
        *("compile a", "decode a", "prefill a", "tune a"),
        *("compile a tuned", "decode a tuned", "prefill a tuned"),
    ]
    assert order[-3:] == ["tune c", "compile c tuned", "decode c tuned"]
    assert order.index("decode c") < order.index("serving a tuned") < order.index("tune c")
    assert "calls a" not in order and "tune b" not in order and len(set(order)) == len(order)
    seconds = {j.model: limit(j, config) for j in jobs(config) if j.section.name == "tune"}
    assert seconds == {"a": 90, "c": 30}
    plain = [j.name for j in jobs(replace(config, sections=["decode", "serving"]))]
    assert plain == ["decode a", "decode b", "decode c", "serving a"]


class Sections:
    """Stands for `run_section`: what each does by its name, and what was run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.ran: list[str] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.folder = folder
        monkeypatch.setattr("bench.gpu.__main__.run_section", self)

    def __call__(self, job: Job, config: GpuConfig, end: float, artifact: str) -> dict[str, Any]:
        self.ran.append(job.name)
        record = {"section": job.section.name, "model": job.model, "tuned": job.tuned}
        if job.name in self.answers:
            return {**record, "status": "failed", **self.answers[job.name]}
        figures: dict[str, Any] = {"x": len(self.ran)}
        if job.section.name == "compile":
            path = self.folder / f"{job.model}-{job.tuned}"
            path.mkdir(exist_ok=True)
            figures["artifact"] = str(path)
        if job.section.name == "tune":
            figures["records"] = 3
        return {**record, "status": "done", "seconds": 1.0, "figures": figures}


def test_a_run_cut_in_two_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done or failed by itself is not tried again; what the time cut is, and so is the
    compile of an artifact that is gone and still wanted."""
    sections = Sections(monkeypatch, tmp_path)
    config = GpuConfig(
        hardware="h200",
        models=["a"],
        sections=["machine", "contracts", "compile", "decode", "tune", "nodes"],
        resume=str(tmp_path / "day"),
        output_file=str(tmp_path / "out" / "r.json"),
    )
    sections.answers = {
        "contracts": {"error": "over 120 s", "figures": {"ran": 5}},
        "decode a tuned": {"status": "cut", "error": "over 3 s", "figures": {"batch_1": {}}},
        "nodes a tuned": {"status": "skipped", "error": "the 9 s are used up"},
    }
    (tmp_path / "day").mkdir()
    (tmp_path / "day" / "h200.json").write_text("{}")
    assert main(config, {}) == 1
    everything = [j.name for j in jobs(config)]
    assert sections.ran == everything
    assert (tmp_path / "out" / "h200.json").read_text() == "{}"
    found = json.loads((tmp_path / "out" / "r.json").read_text())
    assert found == json.loads((tmp_path / "day" / "result.json").read_text())
    assert found["unmeasured"] == ["contracts", "decode a tuned", "nodes a tuned"]
    sections.ran.clear()
    sections.answers = {}
    (tmp_path / "a-True").rmdir()
    assert main(config, {}) == 1  # contracts failed and stay so
    assert sections.ran == ["compile a tuned", "decode a tuned", "nodes a tuned"]
    found = json.loads((tmp_path / "day" / "result.json").read_text())
    assert found["unmeasured"] == ["contracts"] and len(found["sections"]) == len(everything)
    with pytest.raises(BenchUsage, match=r"result\.json is of h200, this run of h100; delete it"):
        main(replace(config, hardware="h100"), {})
    (tmp_path / "day" / "result.json").write_text("{}")
    with pytest.raises(BenchUsage, match=r"result\.json is no result of bench\.gpu"):
        main(config, {})


def test_results_may_go_beside_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Sections(monkeypatch, tmp_path)
    (tmp_path / "h200.json").write_text("{}")
    output = str(tmp_path / "mine.json")
    config = GpuConfig(
        hardware="h200", models=[], sections=["machine"], resume=str(tmp_path), output_file=output
    )
    assert main(config, {}) == 0
    assert (tmp_path / "mine.json").exists() and (tmp_path / "h200.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("given", "option", "words"),
    [
        (
            {"sections": ["decode"], "tune_s": 60.0},
            "tune_s",
            "tune_s=60.0: is for the section tune",
        ),
        ({"sections": ["decode"], "tune": False}, "tune", "tune=False: is for the section tune"),
        ({"sections": ["tokens"], "kernels": ["add"]}, "kernels", "for the section contracts"),
        ({"sections": ["tokens"], "load_s": 2.0}, "load_s", "is for the section serving"),
        ({"tune": False, "tune_s": 60.0}, "tune_s", "tune_s=60: tune=false tunes nothing"),
        ({"sections": ["tune"], "tune": False}, "tune", "asks for tune; leave one of them out"),
    ],
)
def test_an_option_that_changes_nothing_is_refused(
    given: dict[str, Any], option: str, words: str
) -> None:
    with pytest.raises(BenchUsage, match=words):
        main(GpuConfig(**given), {option: "override"})


def test_an_artifact_that_hangs_is_not_waited_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sections of the same artifact are skipped with the reason; the tuned one is tried."""
    sections = Sections(monkeypatch, tmp_path)
    sections.answers = {"decode a": {"error": "over 90 s"}, "tune b": {"error": "no such luck"}}
    config = GpuConfig(hardware="h200", models=["a", "b"], output_file="x")
    monkeypatch.chdir(tmp_path)
    run = Run(config, time.monotonic() + 100)
    records = {job.name: run.do(job) for job in run.todo()}
    assert records["prefill a"]["error"] == "a section with this artifact did not end"
    assert "prefill a" not in sections.ran and "decode a tuned" in sections.ran
    # Without records a second artifact would be the first.
    assert records["compile b tuned"]["error"] == "tuning found nothing, so it is as before"
    assert "compile b tuned" not in sections.ran and "decode b tuned" not in sections.ran


def test_names() -> None:
    assert target_name("NVIDIA H100 80GB HBM3") == "h100"
    with pytest.raises(BenchUsage, match="no target for Tesla"):
        target_name("Tesla T4")
    with pytest.raises(BenchUsage, match="sections: no 'speed'"):
        main(GpuConfig(sections=["speed"]), {})
    with pytest.raises(BenchUsage, match=r"records=a with resume=b: records are kept there"):
        main(GpuConfig(records="a", resume="b"), {})
    assert kind("linear 12.qkv") == "linear *.qkv"
    assert summary({"a": 1.23456, "b": {"c": 2}, "d": [1]}) == "a 1.235, b(c 2)"
    failed = {"section": "x", "model": "", "tuned": False, "status": "failed", "error": "one\ntwo"}
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


# --- what hangs or faults -----------------------------------------------------------------------


@pytest.fixture
def on_stub_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Child processes of this one have the stub driver, with these settings."""
    load()

    def set_(**settings: int) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        for name, value in environment(**settings).items():
            monkeypatch.setenv(name, value)

    return set_


@pytest.mark.parametrize(
    ("setting", "seen"), [("fault_block", "failed: "), ("hang_block", "hung: ")]
)
def test_contracts_go_on_after_what_takes_the_device_down(
    on_stub_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, setting: str, seen: str
) -> None:
    """The cases of four warps do, at first, and are then not tried; the others run (and are wrong:
    the stub computes nothing)."""
    on_stub_here(**{setting: 128})
    monkeypatch.setattr(contracts, "HANG_S", 4.0)
    monkeypatch.setattr(contracts, "GIVEN_UP", 2)
    config = GpuConfig(kernels=["rms_norm"])
    todo = contracts.cases(config.kernels)
    wide = [i for i, case in enumerate(todo) if contracts._sources([case])[0].warps == 4]
    (*_, figures) = contracts.contracts(config)
    assert figures["ran"] == len(todo) and figures["failed"] == len(figures["failures"])
    said = dict(text.split(": ", 1) for text in figures["failures"])
    why = [said.get(f"rms_norm on {label}", "") for _, label, *_ in todo]
    first, second, *_ = wide
    assert why[first].startswith(seen) and why[second].startswith(seen)
    between, after = why[first + 1 : second], why[second + 1 :]
    assert any("not close" in text for text in between)
    assert not any(text.startswith(("failed: ", "hung: ")) for text in between)
    assert after and all(text.startswith("not tried: 2 cases of this kernel") for text in after)


def test_a_kernel_of_which_there_is_none_is_refused() -> None:
    with pytest.raises(BenchUsage, match="kernels: no 'x'; choices: activation, add, "):
        contracts.cases(["x"])


def test_probes_go_on_after_a_fault(on_stub_here: Callable[..., None]) -> None:
    """Those that count on the device fault; the others answer."""
    on_stub_here(fault_block=128)
    (*_, figures) = probes.probes(GpuConfig(torch_device="cpu"))
    faulted = {name for name, found in figures.items() if name != "failed" and "error" in found}
    assert {"cubin_abi", "programmatic_edges", "graph_cost"} <= faulted
    assert {"bindings", "memory_calls", "wished_addresses", "crc_rate"}.isdisjoint(faulted)
    assert figures["failed"] == len(faulted) and len(figures) == len(probes.PROBES) + 1


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
    """The whole of `make gpu` with toys, torch on the CPU: every section is done, before the tuning
    and after."""
    path = tmp_path / "gpu.json"
    sizes = ["batch=[1,8]", "prefill=[64,128]", "context=64", "serving=[32,16]", "rates=[4]"]
    rest = ["load_s=1", "torch_device=cpu", "hardware=h200", "seconds=900", "verify=[]"]
    rest += ["tune_s=20", f"records={tmp_path}"]
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
