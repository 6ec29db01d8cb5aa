"""The stages of a compile, in order. Comes in: a config with the source of every value. Goes out:
the path of a published artifact; progress and report go to stderr. Called by `compiler.__main__`.

Libraries and weights are content-addressed: a compile that changes only the chat template links the
weights of an earlier artifact and takes its libraries from the cache.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from compiler import report, weights_cache
from compiler.code import Code, build_code
from compiler.design import Design, design
from compiler.families.by_length import length_rule
from compiler.families.spec import PoolSpec
from compiler.importer import Imported, import_resolved
from compiler.model import constants
from compiler.pack import Package, writing
from compiler.progress import Progress
from compiler.store import write_weights
from compiler.tuned import check_folder
from compiler.verify import (
    Measured,
    check_accuracy,
    check_device,
    golden_prompts,
    golden_session,
    golden_tokens,
    golden_vectors,
    measure,
)
from conf.resolve import check_supported, settle_target
from conf.schema import CompileConfig
from runtime.artifact import (
    SCHEMA,
    TOOL,
    Artifact,
    EmbeddingInfo,
    Manifest,
    ModelInfo,
    TensorEntry,
    encode_plan,
    plan_path,
    weights_path,
)
from runtime.device.machine import gpu_names

# Where things lie does not change what they are; what records choose is in the plans.
NOT_INPUTS = ("out", "cache", "records")


def compile_model(config: CompileConfig, sources: Mapping[str, str], progress: Progress) -> Path:
    gpus = gpu_names()
    config, sources = settle_target(config, sources, gpus)
    check_supported(config, sources)
    check_folder(config.records)
    cache = Path(config.cache).expanduser()
    with writing("cache", cache):
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    with progress.stage("import"):
        model, config, origins = import_resolved(config, sources)
    if model.dropped:
        progress.show(report.dropped(model.spec.family, model.dropped))
    with progress.stage("design"):
        made = design(model.spec, config, model.weights.in_bfloat16)
        figures = report.fit(made.weights_bytes, made.state, made.work_bytes, made.io_bytes)
    progress.show(fit_report(made, figures, config))
    with Package(Path(config.out), str(config.name)) as package, ThreadPoolExecutor(1) as pool:
        building = pool.submit(build_code, made, config)
        with progress.stage("weights", made.weights_bytes) as advance:
            tensors = store_weights(package, model, made, config, advance)
        measured = None
        if config.accuracy.measure:
            with progress.stage("accuracy"):
                measured = measure(made, model.weights)
                check_accuracy(measured.accuracy, config)
        with progress.stage("kernels"):
            code = building.result()
            for name, data in sorted(code.files.items()):
                package.add(name, "binary", data)
        for name, data in sorted(model.text.files.items()):
            package.add(f"text/{name}", "data", data)
        for bucket in made.buckets:
            package.add(plan_path(0, bucket.name), "data", encode_plan(made.plans[bucket.name]))
        manifest = make_manifest(config, origins, model, made, figures, tensors, code, package)
        # Another GPU than the target's is no reason to fail, and no device to verify on.
        here = made.target == "cpu" or any(config.target.name in g.lower() for g in gpus)
        if measured is not None and here:
            with progress.stage("verify"):
                manifest = verified(package, manifest, made, measured)
        if made.target == "cuda":
            progress.show(code_report(made, manifest, measured is not None))
        with progress.stage("publish"):
            path = package.publish(manifest)
    remember_weights(path, made, model, config)
    return path


def fit_report(made: Design, figures: Mapping[str, int], config: CompileConfig) -> str:
    """What a person wants to know before memory is taken; NoSpace when it cannot run here."""
    assert config.shape.context is not None
    target = config.target
    if made.target == "cuda":
        assert target.memory_gib and target.bandwidth_gb_s and target.tflops and target.tflops_fp8
        memory = int(target.memory_gib * report.GIB)
        bandwidth = target.bandwidth_gb_s * 1e9
        flops, flops_fp8 = target.tflops * 1e12, target.tflops_fp8 * 1e12
    else:
        memory, flops, flops_fp8 = report.memory_bytes(), math.inf, math.inf
        bandwidth = report.read_bandwidth(len(os.sched_getaffinity(0)))
    lines = [report.check_fit(figures, config.shape.context, memory)]
    if made.widened:
        lines.append(f"     {report.widened(made.widened)}")
    lines.append(report.render(made.buckets, made.costs, bandwidth, flops, flops_fp8))
    return "\n".join(lines)


def code_report(made: Design, manifest: Manifest, measured: bool) -> str:
    """What the cubins need, and which calls no measurement chose."""
    lines = [report.binaries(manifest.kernels)]
    if made.fallbacks:
        gpu = manifest.target.levels[0]
        lines.append(report.fallbacks(made.fallbacks, len(made.buckets), gpu))
    if measured and not manifest.golden:
        lines.append(
            f"verify  not run: this machine has no {manifest.target.levels[0]}, so no golden "
            "tokens are recorded; `make gpu` on one compares with the reference"
        )
    return "\n".join(lines)


def store_weights(
    package: Package, model: Imported, made: Design, config: CompileConfig, advance: Any
) -> tuple[TensorEntry, ...]:
    """Written from the model, or linked from an artifact that has the same ones."""
    key = weights_cache.key(model.digests, made.weights, made.tensors)
    cache = Path(config.cache).expanduser() / "weights"
    found = weights_cache.find(cache, key)
    if found is not None:
        package.link(weights_path(0), "weights", found.path, found.entry)
        return found.tensors
    with package.create(weights_path(0), "weights") as file:
        tensors = write_weights(
            file,
            made.weights,
            made.tensors,
            model.weights,
            constants(model.spec, made.shape.context),
            advance,
        )
    return tensors


def remember_weights(path: Path, made: Design, model: Imported, config: CompileConfig) -> None:
    manifest = Artifact.open(path).manifest
    (entry,) = (file for file in manifest.files if file.path == weights_path(0))
    key = weights_cache.key(model.digests, made.weights, made.tensors)
    weights_cache.remember(
        Path(config.cache).expanduser() / "weights",
        key,
        path / weights_path(0),
        entry,
        manifest.tensors[0],
    )


def verified(package: Package, manifest: Manifest, made: Design, measured: Measured) -> Manifest:
    """The manifest with what running the finished files on this machine showed."""
    session = golden_session(Artifact(package.path, manifest))
    try:
        scheme = manifest.quant["scheme"]
        kind = manifest.dtype if scheme == "none" else scheme
        error = check_device(made, measured, session, kind)
        pooled = manifest.model.embedding is not None
        golden = (golden_vectors if pooled else golden_tokens)(session, golden_prompts(made))
    finally:
        session.close()
    accuracy = {**measured.accuracy, "device_error": round(error, 4)}
    return msgspec.structs.replace(manifest, accuracy=accuracy, golden=golden)


def embedding_info(model: Imported) -> EmbeddingInfo | None:
    head = model.spec.head
    if not isinstance(head, PoolSpec):
        return None
    return EmbeddingInfo(
        dim=model.spec.dim,
        pooling=head.pooling,
        normalise=head.normalise,
        whole=model.spec.whole,
        dimensions=model.dimensions,
    )


def make_manifest(
    config: CompileConfig,
    origins: Mapping[str, str],
    model: Imported,
    made: Design,
    figures: Mapping[str, int],
    tensors: tuple[TensorEntry, ...],
    code: Code,
    package: Package,
) -> Manifest:
    assert config.shape.context is not None
    chosen = msgspec.to_builtins(config)
    return Manifest(
        schema=SCHEMA,
        tool=TOOL,
        versions={
            **{name: metadata.version(name) for name in ("numpy", "torch", "torchao")},
            "python": platform.python_version(),
            **code.versions,
        },
        name=str(config.name),
        model=ModelInfo(
            name=model.name,
            family=model.spec.family,
            architectures=model.architectures,
            context=config.shape.context,
            vocab=model.spec.vocab,
            dim=model.spec.dim,
            layers=len(model.spec.layers),
            parameters=model.spec.parameters(),
            eos_token_ids=model.text.eos_token_ids,
            bos_token_id=model.text.bos_token_id,
            embedding=embedding_info(model),
            rope_rule=length_rule(model.spec, config.shape.context),
        ),
        target=code.target,
        dtype=config.dtype,
        quant=msgspec.to_builtins(config.quant),
        kv_dtype=config.kv.dtype,
        widened=made.widened,
        ranks=1,
        config={key: value for key, value in chosen.items() if key not in NOT_INPUTS},
        provenance={key: value for key, value in origins.items() if key not in NOT_INPUTS},
        spec=msgspec.to_builtins(made.spec),
        source=dict(model.digests),
        buckets=made.buckets,
        work_bytes=made.work_bytes,
        io_bytes=made.io_bytes,
        weights_bytes=made.weights_bytes,
        edits=made.shape.edits,
        max_seqs=config.shape.max_seqs,
        max_tokens=config.shape.max_tokens,
        state=made.state,
        libraries=code.libraries,
        kernels=code.kernels,
        counters_bytes=code.counters_bytes,
        files=tuple(sorted(package.files, key=lambda entry: entry.path)),
        tensors=(tensors,),
        report={"fit": dict(figures), "steps": {k: dict(v) for k, v in made.costs.items()}},
        accuracy={},
    )
