"""The row-wise kernels at the sizes of served models: every default configuration builds, spills
nothing and fits a multiprocessor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rowwise_calls import BUCKETS, MODELS, calls

import kernels.cuda.register  # noqa: F401
from kernels.cuda.build import build_cuda
from kernels.kernel import KERNELS, CallShape
from kernels.launch import Source

SHARED = 227 * 1024


def with_fp8_pages(wanted: Iterator[CallShape]) -> Iterator[CallShape]:
    """The calls, and those that write pages again for pages of half the size."""
    for call in wanted:
        yield call
        if "kv_dtype" in call.attrs:
            half = {name: call.attrs[name] // 2 for name in ("layer_offset", "page_bytes")}
            yield replace(call, attrs={**call.attrs, **half, "kv_dtype": "fp8_e4m3"})


def sources(model: str, buckets: tuple[tuple[str, int, int], ...]) -> list[Source]:
    found: dict[Source, None] = {}
    for kind, tokens, seqs in buckets:
        for call in with_fp8_pages(calls(MODELS[model], kind, tokens, seqs)):
            kernels = [k for k in KERNELS["cuda"] if k.op == call.op and not k.tuned_only]
            accepting = [k for k in kernels if k.accepts(call) is None]
            assert accepting, f"{call.op}: {[k.accepts(call) for k in kernels]}"
            for kernel in accepting:
                config = kernel.default(call)
                assert kernel.valid(call, config) is None
                for launch in kernel.launches(call, config):
                    assert launch.source is not None
                    found[launch.source] = None
    return list(found)


def check(wanted: list[Source], cache: Path) -> None:
    for source, (binary, _) in build_cuda(wanted, cache).items():
        what = f"{source.function} {dict(source.constants)}"
        assert binary.stack == 0, f"{what}: spills {binary.stack} bytes"
        assert binary.shared <= SHARED, f"{what}: {binary.shared} bytes of shared memory"
        assert binary.pdl, f"{what} does not wait for its predecessor"
        assert binary.scratch == 0


def test_defaults_build(tmp_path: Path) -> None:
    check(sources("qwen3-0.6b", (BUCKETS[1],)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_bucket_builds(model: str, tmp_path: Path) -> None:
    check(sources(model, BUCKETS), tmp_path)
