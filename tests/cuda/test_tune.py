"""Tuning without a GPU: the whole program on the stub driver, and what its records do to a
compile."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_stub import environment, load
from toy_specs import toy, toy_config

from compiler import report
from compiler.design import draft, guessed, nodes_of
from compiler.errors import CompileError
from compiler.lower import Node
from compiler.measure import BLOCK, TOLD, Candidate, Meter, Task, _numbers, _widened, tasks
from compiler.progress import Progress
from compiler.tune import FIRST_OPS, Tuner, anchors, check_gpu, main, ordered
from compiler.tune_inputs import lengths, step_inputs
from compiler.tune_search import Search
from compiler.tuned import Records, call_key, load_records, save_records
from compiler.worker_process import WorkerLost, WorkerProcess
from conf.errors import ConfigError
from conf.load import load as load_config
from conf.schema import CompileConfig, TuneConfig
from kernels.cuda.kernel import Config, CudaKernel
from runtime.artifact import Bucket

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def cuda_config() -> CompileConfig:
    config = toy_config(toy("llama"), dtype="bfloat16")
    config.target.kind, config.target.name, config.target.arch = "cuda", "h200", "sm_90a"
    return config


def nodes(records: Records = Records()) -> tuple[Node, ...]:
    base = draft(toy("llama"), cuda_config())
    return nodes_of(base.program, base.weights, base.buckets[0], "cuda", records)


def test_a_record_chooses_and_is_read_back(tmp_path: Path) -> None:
    node = next(n for n in nodes() if n.shape.op == "linear")
    other = node.kernel.candidates(node.shape)[1]  # type: ignore[union-attr]
    entry = {"kernel": node.kernel.name, "config": asdict(other), "us": 1.5}
    records = Records(gpu="h200", versions={"triton": "3"}, entries={call_key(node.shape): entry})
    path = save_records(records, tmp_path)
    assert load_records("h200", tmp_path) == records
    assert json.loads(path.read_text())["entries"][call_key(node.shape)]["us"] == 1.5
    chosen = next(n for n in nodes(load_records("h200", tmp_path)) if n.shape == node.shape)
    assert chosen.config == other and chosen.measured and not chosen.guessed
    assert node.guessed and not node.measured


def test_a_record_says_where_codes_are_made() -> None:
    """Of a product that knows its rows' maxima both ways are measured, and either is taken."""
    config = cuda_config()
    config.quant.scheme, config.shape.max_seqs, config.shape.max_tokens = "fp8dq", 64, 64
    base = draft(toy("llama"), config)
    bucket = next(b for b in base.buckets if b.name == "d64")

    def product(records: Records) -> Node:
        found = nodes_of(base.program, base.weights, bucket, "cuda", records)
        return next(n for n in found if n.shape.op == "linear" and "x_amax" in n.shape.shapes)

    node = product(Records())
    assert not node.config.rows_first and len(node.launches) == 1
    task = next(t for t in tasks(base, [bucket]) if t.key == call_key(node.shape))
    for way in ((False, False), (False, True), (True, False)):
        (one, *_) = [c for c in task.candidates if (c.config.rows_first, c.config.x_left) == way]
        entries = {task.key: one.entry(1e-6)}
        chosen = product(Records(gpu="h200", entries=entries))
        assert chosen.measured and chosen.config == one.config
        assert len(chosen.launches) == (2 if one.config.rows_first else 1)


def test_a_record_of_a_configuration_that_is_gone_is_no_choice() -> None:
    node = next(n for n in nodes() if n.shape.op == "linear")
    for entry in (
        {"kernel": node.kernel.name, "config": {"gone": 1}, "us": 1.0},
        {"kernel": "gone", "config": {}, "us": 1.0},
    ):
        same = nodes(Records(gpu="h200", entries={call_key(node.shape): entry}))
        assert next(n for n in same if n.shape == node.shape).config == node.config


def test_a_compile_says_which_calls_fell_back(tmp_path: Path) -> None:
    """Records of one bucket's calls: the report names the calls of the others."""
    config = cuda_config()
    base = draft(toy("llama"), config)
    first, *others = base.buckets
    entries = {
        call_key(node.shape): Candidate.of(node).entry(1e-6)
        for node in nodes_of(base.program, base.weights, first, "cuda", Records())
        if node.guessed
    }
    save_records(Records(gpu="h200", entries=entries), tmp_path)
    config.records = str(tmp_path)
    found = fallbacks_of(config)
    assert found and not any(bucket == first.name for _, bucket in found)
    assert {bucket for _, bucket in found} == {bucket.name for bucket in others}
    text = report.fallbacks(found, len(base.buckets), "h200")
    assert f"{len(found)} calls have no record for h200" in text
    (line,) = (line.split() for line in text.splitlines() if line.strip().startswith("attention"))
    assert line[2:] == [bucket.name for bucket in others]
    everything = report.fallbacks([("a", "x"), ("a", "y"), ("b", "y")], 2, "h200").splitlines()
    assert [line.split() for line in everything[1:]] == [["a", "all", "buckets"], ["b", "y"]]


def fallbacks_of(config: CompileConfig) -> tuple[tuple[str, str], ...]:
    """As a design names them, without building anything."""
    base = draft(toy("llama"), config)
    records = load_records("h200", config.records)
    return guessed(
        {b.name: nodes_of(base.program, base.weights, b, "cuda", records) for b in base.buckets}
    )


def test_damaged_records_are_named(tmp_path: Path) -> None:
    assert load_records("h200", tmp_path).entries == {}
    for text in ("{", '{"schema": 99, "versions": {}, "entries": {}}', '{"schema": 1}'):
        (tmp_path / "h200.json").write_text(text)
        with pytest.raises(CompileError, match=r"h200\.json"):
            load_records("h200", tmp_path)


def test_the_key_of_a_call_leaves_out_where_a_layer_lies() -> None:
    attention = [n for n in nodes() if n.shape.op == "attention"]
    assert len(attention) > 1
    assert len({call_key(n.shape) for n in attention}) == 1


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_inputs_are_a_step(kind: str) -> None:
    base = draft(toy("llama"), cuda_config())
    bucket = Bucket(name="x", tokens=40, seqs=40 if kind == "decode" else 6, pages=4, kind=kind)
    new, keys = lengths(bucket, 24)
    inputs = step_inputs(base.program, bucket, (new, keys), 16, pool=512)
    live = inputs["live"]
    assert live[0] == sum(new) <= bucket.tokens and live[1] == live[2] == len(new) <= bucket.seqs
    assert (new == [1] * 40 and set(keys) == {24}) if kind == "decode" else new == keys
    slots = inputs["kv_slots"][: live[0]]
    assert len(np.unique(slots)) == len(slots)
    starts = inputs["seq_start"][: live[1] + 1]
    assert starts[0] == 0 and starts[-1] == live[0]
    last = inputs["positions"][starts[1:] - 1]
    assert (last + 1 == inputs["seq_len"][: live[1]]).all()


def tune(folder: Path, *words: str, **settings: int) -> subprocess.CompletedProcess[str]:
    """The program on the stub, for two cheap calls of the tiny model."""
    load()  # skips where there is a real driver
    options = ["model=tiny", "target=h200", "dtype=bfloat16", "rounds=2", "memory_gib=0.5"]
    shape = ["shape.max_seqs=1", "shape.max_tokens=16", "shape.context=64"]
    return subprocess.run(
        [sys.executable, "-m", "compiler.tune", *options, *shape, f"records={folder}", *words],
        cwd=ROOT,
        env=environment(**settings),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_program_on_the_stub(tmp_path: Path) -> None:
    """Candidates are built, bound, launched and (by the stub's clock) timed; the records come out
    and the step is settled. What has a record is not measured again."""
    done = tune(tmp_path, "ops=[embed,rope_table]")
    assert done.returncode == 0, done.stderr
    records = load_records("h200", tmp_path)
    assert {key.split()[0] for key in records.entries} == {"embed", "rope_table"}
    assert {"triton", "ptxas", "gpu", "driver"} <= set(records.versions)
    assert "step d1:" in done.stderr and "step t16:" in done.stderr and not records.failed
    again = tune(tmp_path, "ops=[embed,rope_table]")
    assert again.returncode == 0 and "default" not in again.stderr
    assert load_records("h200", tmp_path) == records
    # What was cut short goes on; what other tools measured does not count.
    key = next(iter(records.entries))
    cut = {**records.entries, key: {**records.entries[key], "partial": True}}
    save_records(replace(records, entries=cut), tmp_path)
    assert tune(tmp_path, "ops=[embed,rope_kv]").stderr.count("default") == 1
    assert not any("partial" in e for e in load_records("h200", tmp_path).entries.values())
    save_records(replace(records, versions={"triton": "0"}), tmp_path)
    done = tune(tmp_path, "ops=[embed]")
    assert "records of other versions" in done.stderr
    assert {k.split()[0] for k in load_records("h200", tmp_path).entries} == {"embed"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "seen"), [("hang_block", "hung: no answer in 1.5 s"), ("fault_block", "failed: ")]
)
def test_a_candidate_that_takes_the_device_down_stops_no_other(
    tmp_path: Path, setting: str, seen: str
) -> None:
    """Of embed's candidates those of two warps hang, or fault. They are recorded at once, the
    others are measured, and a later run leaves them alone."""
    words = ("ops=[embed]", "hang=1.5", "contenders=0")
    done = tune(tmp_path, *words, **{setting: 64})
    assert done.returncode == 0, done.stderr
    records = load_records("h200", tmp_path)
    assert len(records.entries) == 2 and len(records.failed) == 2
    for failed in records.failed.values():
        assert all("warps=2" in name and why.startswith(seen) for name, why in failed.items())
    assert all(entry["config"]["warps"] != 2 for entry in records.entries.values())
    again = tune(tmp_path, *words, **{setting: 64})
    assert again.returncode == 0 and "hung" not in again.stderr
    assert load_records("h200", tmp_path) == records


def test_records_of_another_gpu_are_not_written_under_this_name() -> None:
    check_gpu("h200", "NVIDIA H200")
    check_gpu("h200", "Stub")
    with pytest.raises(ConfigError, match=r"target=h200: .* NVIDIA H100 80GB HBM3, .*target=h100"):
        check_gpu("h200", "NVIDIA H100 80GB HBM3")


class Clock:
    """A process that measures and a pool that builds, of which the time is up after two answers."""

    def __init__(self) -> None:
        self.hello = {"gpu": "fake", "driver": 13000}
        self.answers = [3e-6, 1e-6]
        self.tuner: Any = None

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        if len(self.answers) == 1:
            self.tuner.calls_end = 0.0
        return {"seconds": self.answers.pop(0)}

    def submit(self, source: Any) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done


def test_a_search_cut_short_within_a_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as partial, and a later run begins with what it found best."""
    words = ["model=tiny", "target=h200", f"records={tmp_path}"]
    config = load_config(TuneConfig, "tune", words).config
    base = draft(toy("llama"), cuda_config())
    monkeypatch.setattr(Tuner, "usable", lambda *args, **options: True)

    def tuner() -> Any:
        clock: Any = Clock()
        deadline = time.monotonic() + 600
        clock.tuner = Tuner(base, config, clock, Progress(), deadline)
        return clock.tuner

    task = next(t for t in ordered(base, ["linear"]) if len(t.candidates) > 4)
    first = tuner()
    first.search([task], first.process)
    entry = first.records.entries[task.key]
    assert entry["partial"] and entry["us"] == 1.0
    later = tuner().near(task)
    assert [asdict(one.config) for one in later] == [entry["config"]]


def fake_task(kernel: CudaKernel, configs: list[Any]) -> Task:
    node = next(n for n in nodes() if n.shape.op == "linear")
    bucket = Bucket(name="d1", tokens=1, seqs=1, pages=4, kind="decode")
    made = tuple(Candidate(kernel=kernel, config=config) for config in configs)
    return Task(key="k", bucket=bucket, node=node, candidates=made)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point(Config):
    x: int
    y: int


def test_the_search_climbs_and_ends() -> None:
    """The best of a smooth space is found without measuring all of it; candidates near a good one
    of another bucket come at once."""
    kernel = CudaKernel(
        name="fake",
        op="linear",
        accepts=lambda call: None,
        space=lambda call: (),
        default=lambda call: Point(x=0, y=0),
        launches=lambda call, config: (),
    )
    task = fake_task(kernel, [Point(x=x, y=y) for x in range(9) for y in range(9)])
    search = Search(task)

    def run() -> int:
        count = 0
        while found := search.wanted():
            for one in found:
                count += 1
                search.tell(one, 1 + abs(one.config.x - 6) + abs(one.config.y - 5))
        return count

    assert run() < 60 and search.ranked[0][1].config == Point(x=6, y=5)
    near = task.candidates[6 * 9 + 5]
    search = Search(task, [near], wide=False)
    assert search.wanted() == [task.candidates[0], near] and not search.wanted()


class HostLauncher:
    """Memory of a device in which a run does what it is told."""

    gpu = SimpleNamespace(l2=1 << 10)

    def __init__(self) -> None:
        self.memory, self.used = np.zeros(64 << 20, np.uint8), 0
        self.work: Any = lambda: None

    def free_memory(self) -> int:
        return len(self.memory) - self.used

    def allocate(self, size: int) -> int:
        self.used += size
        return self.used - size

    def fill(self, at: int, size: int, value: int = 0) -> None:
        self.memory[at : at + size] = value

    def write(self, at: int, data: Any) -> None:
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        self.memory[at : at + len(raw)] = raw

    def read(self, at: int, size: int) -> Any:
        return self.memory[at : at + size].copy()

    def graph(self, calls: Any) -> Any:
        return SimpleNamespace(close=lambda: None)

    def run(self, graph: Any) -> None:
        self.work()


@pytest.mark.parametrize("kv", ["bfloat16", "fp8_e4m3"])
def test_pages_that_a_candidate_writes_are_compared(tmp_path: Path, kv: str) -> None:
    config = cuda_config()
    config.kv.dtype = kv
    base = draft(toy("llama"), config)
    host: Any = HostLauncher()
    common = {"context": 64, "memory_gib": 0.02, "rounds": 1, "cache": tmp_path, "arch": "sm_90a"}
    meter = Meter(host, base, **common)  # type: ignore[arg-type]
    bucket = next(b for b in base.buckets if b.kind == "decode" and b.seqs > 1)
    writes = [t for t in tasks(base, [bucket]) if "kv_slots" in t.node.call.ins]
    assert writes and all(t.node.call.op != "attention" for t in writes)
    call = meter.call(writes[0])
    last = call.written_pages()[-1]
    assert len(call.written_pages()) > 1
    assert call.differs([[]]) is None and call.differs([[]]) is None
    host.work = lambda: host.memory.__setitem__(last + 2, 0x3D)  # the neighbour of what was there
    assert call.differs([[]]) is None
    host.work = lambda: host.memory.__setitem__(slice(last, last + 2), 0x7A)
    assert "kv is off by" in (call.differs([[]]) or "")


def test_rows_hold_no_more_than_their_maxima_say() -> None:
    """A linear that is told its rows' largest numbers would cut off what is larger, where one that
    finds them itself does not: the two would not compute the same."""
    g = np.random.default_rng(0)
    x = _widened(_numbers(g, "bfloat16", 2 * BLOCK).view(np.uint8), "bfloat16")
    norm = _numbers(g, "float32", 4 * BLOCK)
    assert 0.05 < np.abs(x).max() <= TOLD["x_amax"] and np.abs(norm).max() < 1


def test_a_process_that_hangs_or_ends_is_replaced() -> None:
    code = """
import json, sys, time
print(json.dumps({"hello": json.loads(sys.stdin.readline())["first"]}), flush=True)
for line in sys.stdin:
    question = json.loads(line)["q"]
    if question == "hang":
        time.sleep(60)
    if question == "die":
        sys.exit("out of luck")
    print(json.dumps({"answer": question}), flush=True)
"""
    with WorkerProcess([sys.executable, "-c", code], {"first": 1}) as process:
        assert process.hello == {"hello": 1}
        for question, why in (("hang", "hung: no answer in 0.3 s"), ("die", "failed: out of luck")):
            with pytest.raises(WorkerLost, match=why):
                process.ask({"q": question}, 0.3)
            assert process.ask({"q": "x"}, 10) == {"answer": "x"}
    with pytest.raises(CompileError, match="does not start: failed: no such luck"):
        WorkerProcess(
            [sys.executable, "-c", "import sys; sys.exit('no such luck')"], {}
        ).__enter__()


def test_the_order_of_tuning() -> None:
    """The costly calls of the valuable buckets, then the cheap ones, then the other buckets."""
    base = draft(toy("llama"), cuda_config())
    first = anchors(base.buckets)
    assert first[0] == "d1" and {b.name for b in base.buckets} >= set(first)
    order = ordered(base)
    assert order[0].bucket.name == "d1" and order[0].node.shape.op in FIRST_OPS
    assert len({task.key for task in order}) == len(order)


def test_a_cpu_is_not_tuned() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "compiler.tune", "model=tiny", "target=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "only GPUs are tuned" in done.stderr


@pytest.mark.parametrize("word", ["out=x", "name=x", "accuracy.max_delta=0.1"])
def test_options_without_an_effect_are_refused(word: str) -> None:
    loaded = load_config(TuneConfig, "tune", ["model=tiny", "target=h200", word])
    with pytest.raises(ConfigError, match=f"{word.partition('=')[0]}: does nothing here"):
        main(loaded.config, loaded.sources)
