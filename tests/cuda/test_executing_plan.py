"""The plans a CUDA artifact stores, executed: the same nodes and addresses, interpreted on host
memory, driven by the engine's scheduler through prefill, chunks, mixed batches and decode, against
the CPU target.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import toy_models

from compiler import maxima, pipeline
from compiler.design import Design, design, draft
from compiler.families.spec import ModelSpec
from compiler.importer import import_model
from compiler.inspect import inputs, verify
from compiler.interpret_plan import InterpretedSession
from compiler.maxima import MAXIMA_TOKENS
from compiler.measure import tasks
from compiler.pipeline import compile_model
from compiler.progress import Progress
from compiler.tuned import Records, save_records
from compiler.verify import check_device, measure
from conf.load import load
from conf.schema import CompileConfig
from runtime.artifact import FLAG_PROGRAMMATIC, Artifact
from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.device.base import Session, open_session
from runtime.errors import DamagedArtifact, UsageError
from runtime.request import Event, Request, SamplingParams

pytest.importorskip("transformers")
# Chunks of at most 16 tokens: the first prompt is cut, and its end runs beside decode rows.
PROMPTS = [[(7 * i * i + 3 * i + s) % 128 for i in range(n)] for s, n in enumerate((21, 5, 1))]
NEW = 4
FAST = ("qwen3",)
QUANTIZED = ("none", "fp8dq", "int8", "int4")
# Each brings parts that no other has: windows and soft-caps, alibi, parallel layers with LayerNorm,
# plain products with biases, rope by length, experts, sinks, latent attention (in both forms).
SLOW = (
    "gemma2",
    "baichuan",
    "cohere",
    "phi",
    "qwen",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "minicpm3",
)
# HEADSTART_ALL_FAMILIES=1: every family's last toy, a quarter of an hour.
EVERY = tuple(toy_models.RECIPES) if os.environ.get("HEADSTART_ALL_FAMILIES") else (*FAST, *SLOW)
CASES = [
    pytest.param(
        recipe,
        id=f"{family}-{recipe.label}",
        marks=[] if family in FAST else [pytest.mark.slow],
    )
    for family in EVERY
    for recipe in toy_models.RECIPES[family][-1].forms()
]


@dataclass
class Pair:
    cpu: Artifact
    cuda: Artifact
    made: Design
    options: tuple[str, ...]


def compiled(source: Path, out: Path, target: str, dtype: str, *more: str) -> Artifact:
    overrides = ["model=hf", f"model.source={source}", f"dtype={dtype}", "name=toy", f"out={out}"]
    shape = ["shape.context=64", "shape.max_tokens=16", "shape.max_seqs=4", f"target={target}"]
    loaded = load(CompileConfig, "compile", [*overrides, *shape, *more])
    return Artifact.open(compile_model(loaded.config, loaded.sources, Progress()))


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("toy")
    toy_models.save(request.param, folder / "source")
    cpu, cuda = (
        compiled(folder / "source", folder / target, target, "float32", *request.param.options)
        for target in ("cpu", "h200")
    )
    return Pair(cpu, cuda, design(*inputs(cuda.manifest)), tuple(request.param.options))


def heard(session: Session, artifact: Artifact, prompts: list[list[int]] = PROMPTS) -> list[Event]:
    """Tokens and logprobs of all prompts at once, with the prompts scored."""
    loop = EngineLoop(
        session, EngineOptions(artifact=str(artifact.path), prefix_cache=False), eos=()
    )
    for number, tokens in enumerate(prompts):
        sampling = SamplingParams(max_new_tokens=NEW, temperature=0.0)
        loop.add(
            Request(
                id=number, tokens=tokens, sampling=sampling, logprobs=True, prompt_logprobs_from=0
            )
        )
    events = {number: Event(id=number) for number in range(len(prompts))}
    while loop.has_work:
        for event in loop.step():
            assert event.finish is None or event.finish.reason == "length", event.finish
            before = events[event.id]
            events[event.id] = Event(
                id=event.id,
                tokens=before.tokens + event.tokens,
                logprobs=before.logprobs + event.logprobs,
                prompt_logprobs=before.prompt_logprobs + event.prompt_logprobs,
            )
    loop.close()
    return list(events.values())


def test_stored_plans_compute_what_the_cpu_computes(pair: Pair) -> None:
    spec: ModelSpec = pair.made.spec
    assert spec.layers
    ours = heard(InterpretedSession(pair.cuda, pair.made, pages=24), pair.cuda)
    wanted = heard(open_session(pair.cpu, kv_tokens=24 * 16), pair.cpu)
    for one, other in zip(ours, wanted, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-4)
        scores = [[p for p in event.prompt_logprobs if p is not None] for event in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=2e-4)


def test_every_launch_but_the_first_is_behind_a_programmatic_edge(pair: Pair) -> None:
    for bucket in pair.cuda.manifest.buckets:
        plan = pair.cuda.plan(0, bucket.name)
        assert (plan.nodes["flags"][1:] & FLAG_PROGRAMMATIC).all()
        assert not plan.nodes["flags"][0]


def test_another_gpu_than_the_targets_is_no_device_to_verify_on(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "gpu_names", lambda: ["NVIDIA A100"])
    source = str(pair.cuda.manifest.config["model"]["source"])
    again = compiled(Path(source), tmp_path, "h200", "float32", *pair.options)
    assert not again.manifest.golden and again.digest == pair.cuda.digest


def test_plans_are_verified_with_the_records_of_the_compile(tmp_path: Path) -> None:
    toy_models.save(toy_models.RECIPES["llama"][0], tmp_path / "source")
    plain = compiled(tmp_path / "source", tmp_path / "plain", "h200", "float32")
    assert any(line.startswith("plans") for line in verify(plain))
    base = draft(*inputs(plain.manifest))
    task = next(t for t in tasks(base, base.buckets) if t.node.shape.op == "linear")
    other = next(one for one in task.candidates if one.config != task.node.config)
    records = tmp_path / "records"
    save_records(Records(gpu="h200", entries={task.key: other.entry(1e-6)}), records)
    tuned = compiled(
        tmp_path / "source", tmp_path / "tuned", "h200", "float32", f"records={records}"
    )
    assert tuned.digest != plain.digest
    with pytest.raises(DamagedArtifact, match="give --records if it was compiled with records="):
        list(verify(tuned))
    assert any(line.startswith("plans") for line in verify(tuned, str(records)))
    gone = str(tmp_path / "gone")
    with pytest.raises(UsageError, match=f"records={gone}: is no directory"):
        list(verify(tuned, gone))
    with pytest.raises(UsageError, match=f"records={gone}: is no directory"):
        compiled(tmp_path / "source", tmp_path / "tuned", "h200", "float32", f"records={gone}")


@pytest.mark.slow
def test_fp8_pages_hold_what_the_cpu_holds(tmp_path: Path) -> None:
    """In float32 both targets round the same keys and values to fp8, but for a value next to the
    border of two codes."""
    toy_models.save(toy_models.RECIPES["llama"][0], tmp_path / "source")
    cpu, cuda = (
        compiled(tmp_path / "source", tmp_path / target, target, "float32", "kv=fp8_e4m3")
        for target in ("cpu", "h200")
    )
    made = design(*inputs(cuda.manifest))
    ours = heard(InterpretedSession(cuda, made, pages=24), cuda)
    wanted = heard(open_session(cpu, kv_tokens=24 * 16), cpu)
    for one, other in zip(ours, wanted, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=5e-3)


@pytest.mark.parametrize("tokens", [MAXIMA_TOKENS, 2])
def test_quantized_activations_are_the_references_in_every_batch(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 a step is the reference's to its last digits, codes included; and a prompt beside
    others (chunks and mixed steps) has the tokens it has alone (a step of its own, decode rows),
    where all products make the codes themselves and where those of more than two rows have them
    made first."""
    monkeypatch.setattr(maxima, "MAXIMA_TOKENS", tokens)
    toy_models.save(toy_models.RECIPES["llama"][0], tmp_path / "source")
    artifact = compiled(tmp_path / "source", tmp_path, "h200", "float32", "quant=fp8dq")
    for bucket in artifact.manifest.buckets:
        plan = artifact.plan(0, bucket.name)
        assert (plan.nodes["flags"][1:] & FLAG_PROGRAMMATIC).all()
    made = design(*inputs(artifact.manifest))
    source = load(CompileConfig, "compile", ["model=hf", f"model.source={tmp_path / 'source'}"])
    measured = measure(made, import_model(source.config).weights)
    session = InterpretedSession(artifact, made, pages=8)
    assert check_device(made, measured, session, "fp8dq") < 1e-4
    beside = heard(InterpretedSession(artifact, made, pages=24), artifact)[1]
    (alone,) = heard(InterpretedSession(artifact, made, pages=24), artifact, PROMPTS[1:2])
    assert beside.tokens == alone.tokens
    assert beside.logprobs == pytest.approx(alone.logprobs, abs=5e-3)


@pytest.mark.parametrize(
    ("family", "scheme", "kv"),
    [
        ("llama", "fp8", "auto"),
        ("llama", "none", "fp8_e4m3"),
        pytest.param("minicpm3", "none", "fp8_e4m3", marks=pytest.mark.slow),
        *(pytest.param("llama", s, "auto", marks=pytest.mark.slow) for s in QUANTIZED),
        pytest.param("llama", "int4", "fp8_e5m2", marks=pytest.mark.slow),
        pytest.param("mixtral", "fp8dq", "auto", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "fp8dq", "fp8_e4m3", marks=pytest.mark.slow),
        pytest.param("minicpm3", "none", "fp8_e5m2", marks=pytest.mark.slow),
        pytest.param("gemma2", "none", "fp8_e4m3", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_and_quantized_plans_agree_with_the_reference(
    family: str, scheme: str, kv: str, tmp_path: Path
) -> None:
    """The check every compile makes on its device, made on the executed plan."""
    toy_models.save(toy_models.RECIPES[family][-1], tmp_path / "source")
    overrides = ["model=hf", f"model.source={tmp_path / 'source'}", "dtype=bfloat16", "name=toy"]
    overrides += [f"out={tmp_path / 'out'}", f"quant={scheme}", f"kv={kv}", "target=h200"]
    shape = ["shape.context=64", "shape.max_tokens=32", "shape.max_seqs=32"]
    loaded = load(CompileConfig, "compile", [*overrides, *shape])
    artifact = Artifact.open(compile_model(loaded.config, loaded.sources, Progress()))
    made = design(*inputs(artifact.manifest))
    measured = measure(made, import_model(loaded.config).weights)
    session = InterpretedSession(artifact, made, pages=8)
    kind = "bfloat16" if scheme == "none" else scheme
    assert check_device(made, measured, session, kind) > 0
