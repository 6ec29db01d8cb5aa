"""`python -m compiler.inspect show|diff|verify <artifact> …`: what an artifact is, how two differ,
and whether one is sound.

Comes in: paths of artifacts. Goes out: text on stdout and the exit codes of the artifact contract
(`diff`: 1 when they differ). `verify` reads every byte, records the plans again and compares, and
runs the golden prompts on this machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from compiler import report
from compiler.design import InBfloat16, design
from compiler.families.spec import ModelSpec
from compiler.program import render
from compiler.tuned import check_folder
from compiler.verify import golden_session, golden_tokens, golden_vectors, same_golden
from conf.schema import CompileConfig
from runtime.artifact import (
    ARENAS,
    PARAM_ADDRESS,
    Artifact,
    LaunchPlan,
    Manifest,
    encode_plan,
    plan_path,
)
from runtime.errors import DamagedArtifact, HeadstartError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compiler.inspect", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, count in (("show", 1), ("diff", 2), ("verify", 1)):
        command = commands.add_parser(name)
        command.add_argument("artifact", nargs=count)
        if name == "show":
            command.add_argument("--program", action="store_true", help="the fused program")
            command.add_argument("--plan", metavar="BUCKET", help="every node of a bucket's plan")
        if name == "verify":
            command.add_argument(
                "--records", metavar="FOLDER", help="the tuning records it was compiled with"
            )
    options = parser.parse_args(argv)
    try:
        artifacts = [Artifact.open(path) for path in options.artifact]
        if options.command == "verify":
            print("\n".join(verify(artifacts[0], options.records)))
            return 0
        if options.command == "diff":
            lines = list(diff(artifacts[0].manifest, artifacts[1].manifest))
            print("\n".join(lines) or "equal")
            return 1 if lines else 0
        print("\n".join(show(artifacts[0])))
        if options.program:
            print(render(design(*inputs(artifacts[0].manifest)).program), end="")
        if options.plan:
            buckets = [bucket.name for bucket in artifacts[0].manifest.buckets]
            if options.plan not in buckets:
                raise UsageError(f"--plan {options.plan}: the buckets are {', '.join(buckets)}")
            print("\n".join(show_plan(artifacts[0].plan(0, options.plan))))
    except HeadstartError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def show(artifact: Artifact) -> Iterator[str]:
    m = artifact.manifest
    yield f"artifact   {artifact.path.name}"
    yield f"made by    {m.tool}; {', '.join(f'{k} {v}' for k, v in sorted(m.versions.items()))}"
    yield (
        f"model      {m.model.name} ({m.model.family}): {m.model.parameters:,} parameters, "
        f"{m.model.layers} layers of {m.model.dim}, vocabulary {m.model.vocab}"
    )
    quant = m.quant["scheme"]
    grouped = "" if quant == "none" else f" in groups of {m.quant['group_size']}"
    mixers = (layer["mixer"] for layer in m.spec["layers"])
    forms = "".join(f", {form} MLA" for form in {x["form"] for x in mixers if "form" in x})
    yield f"numbers    dtype {m.dtype}, quant {quant}{grouped}, kv {m.kv_dtype}{forms}"
    if m.widened:
        yield f"stored     {report.widened(m.widened)}"
    yield f"target     {m.target.kind} {m.target.machine}: {', '.join(m.target.levels)}"
    yield f"serves     {m.model.context} tokens of context, {m.max_seqs} sequences in a step"
    fit = m.report["fit"]
    yield (
        f"memory     weights {report.size(fit['weights'])}, token state "
        f"{report.size(fit['token_state'])}, work {report.size(fit['work'])}, io "
        f"{report.size(fit['io'])}, {report.size(fit['kv_token'])} per token"
    )
    for bucket in m.buckets:
        cost = m.report["steps"][bucket.name]
        yield (
            f"step {bucket.name:<5} {bucket.tokens} tokens, {bucket.seqs} sequences: "
            f"{cost['launches']} launches, {report.size(cost['read'])} read, "
            f"{cost['flops'] / 1e9:.2f} GFLOP"
        )
    yield f"accuracy   {', '.join(f'{k} {v:g}' for k, v in sorted(m.accuracy.items()))}"
    for entry in m.files:
        size = report.size(entry.size)
        yield f"file       {entry.path}  {entry.role}  {size}  {entry.sha256[:16]}"


def show_plan(plan: LaunchPlan) -> Iterator[str]:
    """One line per node: what it computes, the kernel, its parameters."""
    for node, label in zip(plan.nodes, plan.header.labels, strict=True):
        start = int(node["first_param"])
        shown = []
        for param in plan.params[start : start + int(node["params"])]:
            value = int(param["value"])
            address = int(param["kind"]) == PARAM_ADDRESS
            shown.append(f"{ARENAS[int(param['arena'])]}+{value}" if address else f"{value:#x}")
        yield f"{label}: {plan.header.kernels[int(node['kernel'])].name}({', '.join(shown)})"


def diff(a: Manifest, b: Manifest) -> Iterator[str]:
    """One line per fact that differs; checksums of tensors are counted, not listed."""
    one, two = (_facts(msgspec.to_builtins(m)) for m in (a, b))
    for key in sorted({*one, *two}):
        if one.get(key) != two.get(key):
            yield f"{key}: {one.get(key, 'absent')} | {two.get(key, 'absent')}"
    if a.tensors != b.tensors:
        crcs = [{t.name: t.crc32c for t in m.tensors[0]} for m in (a, b)]
        common = crcs[0].keys() & crcs[1].keys()
        changed = sum(crcs[0][name] != crcs[1][name] for name in common)
        yield f"tensors: {len(crcs[0])} | {len(crcs[1])}, {changed} of {len(common)} common differ"


def _facts(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path; lists of named things by name. Without tensors."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items() if key != "tensors" or path]
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        items = [
            (str(item.get("path") or item.get("name") or index), item)
            for index, item in enumerate(value)
        ]
    else:
        return {path: value}
    facts: dict[str, Any] = {}
    for key, item in items:
        facts |= _facts(item, f"{path}.{key}" if path else key)
    return facts


def verify(artifact: Artifact, records: str | None = None) -> Iterator[str]:
    """A line per check that held; the first that does not is an error. `records`: folder of the
    tuning records that the compile was given (`records=`; None: kernels/tuned)."""
    target = artifact.manifest.target
    if records is not None and target.kind != "cuda":
        raise UsageError(
            f"--records {records}: tuning records are of GPUs, the artifact is for "
            f"{target.machine}; leave it out"
        )
    check_folder(records)
    artifact.verify()
    yield f"files      {len(artifact.manifest.files)} have their sha256"
    _check_plans(artifact, records)
    yield f"plans      {len(artifact.manifest.buckets)} are what this compiler records"
    manifest = artifact.manifest
    expected = manifest.golden
    if not expected:
        yield "tokens     none recorded: the machine that compiled it had no such device"
        return
    session = golden_session(artifact)
    try:
        again = golden_tokens if manifest.model.embedding is None else golden_vectors
        found = again(session, [list(golden.prompt) for golden in expected])
    finally:
        session.close()
    for one, two in zip(expected, found, strict=True):
        scheme = manifest.quant["scheme"]
        if not same_golden(one, two, manifest.dtype if scheme == "none" else scheme):
            a, b = (list(golden.tokens or golden.vector[:4]) for golden in (one, two))
            raise DamagedArtifact(
                f"artifact {artifact.path}: golden prompt {list(one.prompt)}: expected {a}, "
                f"found {b}; compile it again on this machine"
            )
    count = sum(len(golden.tokens) or 1 for golden in expected)
    what = "tokens" if manifest.model.embedding is None else "vectors"
    yield f"{what:10} {count} golden ones repeated"


def inputs(manifest: Manifest) -> tuple[ModelSpec, CompileConfig, InBfloat16]:
    spec = msgspec.convert(manifest.spec, ModelSpec)
    config = msgspec.convert(manifest.config, CompileConfig)
    return spec, config, frozenset(manifest.widened).__contains__


def _check_plans(artifact: Artifact, records: str | None) -> None:
    """`design` verifies each plan on paper; the stored ones must be the same bytes."""
    spec, config, in_bfloat16 = inputs(artifact.manifest)
    made = design(spec, replace(config, records=records), in_bfloat16)
    remedy = "compile it again"
    if made.target == "cuda":
        remedy = f"give --records if it was compiled with records=, else {remedy}"
    for bucket in made.buckets:
        name = plan_path(0, bucket.name)
        if artifact.read(name) != encode_plan(made.plans[bucket.name]):
            raise DamagedArtifact(
                f"artifact {artifact.path}, file {name}: expected the plan this compiler records, "
                f"found one of {artifact.manifest.tool} in another state; {remedy}"
            )


if __name__ == "__main__":
    sys.exit(main())
