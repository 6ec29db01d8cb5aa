"""`bench.gpu` without a GPU: its processes on the stub driver, its bookkeeping."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_stub import environment, load
from stub_run import ROOT, on_stub

from bench.errors import BenchUsage
from bench.gpu import contracts, probes
from bench.gpu.__main__ import Run, check, line, main, run_section, summary, target_name
from bench.gpu.dlpack import DlPack
from bench.gpu.model import words
from bench.gpu.sections import SECTIONS, Job, Section, jobs, limit
from conf.bench_schema import GpuConfig
from kernels.launch import Source
from kernels.toolchain import ToolchainError


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


def test_lengths_of_serving_are_of_the_artifact_too() -> None:
    config = GpuConfig(sections=["compile"], models=["llama3-8b"], hardware="h200")
    check(replace(config, serving=[15000, 1000]), {"serving": "override"})
    longer = words(replace(config, serving=[15000, 1000], prefill=[64]), "llama3-8b")
    assert longer != words(replace(config, prefill=[64]), "llama3-8b")


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
    assert summary({"a": 1.23456, "b": {"c": 2}, "d": [1]}) == "a 1.235, b(c 2)"
    failed = {"section": "x", "model": "", "tuned": False, "status": "failed", "error": "one\ntwo"}
    assert line(failed).endswith("two")


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


def test_contracts_name_what_cannot_be_built(
    on_stub_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cases fail with the reason; the others run (and are wrong: the stub computes nothing)."""
    on_stub_here()
    config = GpuConfig(kernels=["add"])
    todo = contracts.cases(config.kernels)
    gone = contracts._sources(todo[:1])[0]
    every = contracts.build_each

    def each(sources: list[Source], cache: Path) -> object:
        built, _ = every(sources, cache)
        return built, {gone: ToolchainError("no compiler")}

    monkeypatch.setattr(contracts, "build_each", each)
    first, *_, last = contracts.contracts(config)
    assert first["running"].startswith("add on ") and "failed" not in first
    unbuilt = [c for c in todo if gone in contracts._sources([c])]
    assert sum("no compiler" in text for text in last["failures"]) == len(unbuilt) < len(todo)
    assert any("not close" in text for text in last["failures"])
    assert last["ran"] == last["cases"] == len(todo) and last["kernels"] == 1


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
