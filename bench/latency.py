"""Static batch latency without a server: `python -m bench.latency artifact=… batch=[1,8,32]
input_len=1024 output_len=128`.

In: `LatencyConfig` (conf/bench/latency.yaml). Out: the lines of SGLang's single-batch benchmark,
the share of the bandwidth bound (read bandwidth is measured between the steps, over a buffer of
the size of the weights, on a GPU over the weights), with `profile` where the steps' time goes, and
one JSON line per shape in `output_file`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import closing
from itertools import repeat
from statistics import mean, median
from typing import Any

from bench import results
from bench.bandwidth import Bandwidth, Rate, share_of_bound
from bench.device_bandwidth import DeviceBandwidth
from bench.static_batch import StaticBatch, TooLarge, step_bytes
from bench.step_profile import profile, profiled, table
from bench.windows import windows
from conf.bench_schema import LatencyConfig
from conf.load import run
from runtime.artifact import Artifact
from runtime.device.base import Session
from runtime.device.cpu import CpuSession
from runtime.device.cuda import CudaSession
from runtime.device.launcher import Launcher

SHOWN_STEPS = 5


def measure(
    static: StaticBatch,
    config: LatencyConfig,
    artifact: Artifact,
    buffer: Bandwidth | DeviceBandwidth,
    shape: tuple[int, int, int],
) -> dict[str, Any]:
    """`config.runs` runs of one (batch, input_len, output_len): medians over runs."""
    batch, input_len, output_len = shape
    prefills: list[float] = []
    totals: list[float] = []
    medians: list[float] = []
    steps: list[float] = []
    shares: list[float] = []
    read = step_bytes(artifact, batch, input_len + output_len / 2)
    for number in range(config.runs):
        rates: list[Rate] = []
        seed = hash((config.seed, number, *shape)) & 0xFFFFFFFF  # every run its own prompts
        prompts = static.prompts(batch, input_len, seed)
        done = static.run(prompts, output_len, pause=lambda: rates.append(buffer.read()))  # noqa: B023
        means = windows(done.decode)
        prefills.append(done.prefill)
        totals.append(done.prefill + (output_len - 1) * mean(done.decode))
        medians.append(median(means))
        shares += map(share_of_bound, repeat(read), means, rates, rates[1:])
        steps = steps or done.decode
    rate = buffer.rate
    prefill, total, decode = median(prefills), median(totals), median(medians)
    share = median(shares)
    print(
        f"Prefill. latency: {prefill:.5f} s, throughput: {batch * input_len / prefill:.2f} token/s"
    )
    for i, seconds in enumerate(steps[:SHOWN_STEPS]):
        print(
            f"Decode {i}. Batch size: {batch}, latency: {seconds:.5f} s, "
            f"throughput: {batch / seconds:.2f} token/s"
        )
    print(
        f"Decode.  median latency: {decode:.5f} s, median throughput: {batch / decode:.2f} token/s"
    )
    overall = batch * (input_len + output_len) / total
    print(f"Total. latency: {total:.3f} s, throughput: {overall:.2f} token/s")
    print(
        f"Bound. read: {read / 1e6:.1f} MB per step, {read / decode / 1e9:.2f} GB/s; memory gave "
        f"{rate.median / 1e9:.2f} (best {rate.best / 1e9:.2f}); of the reads next to them "
        f"the steps reach {100 * share:.1f} % ({100 * min(shares):.0f} to {100 * max(shares):.0f})"
    )
    return {
        "run_name": config.run_name,
        "batch_size": batch,
        "input_len": input_len,
        "output_len": output_len,
        "runs": config.runs,
        "prefill_latency": prefill,
        "prefill_throughput": batch * input_len / prefill,
        "median_decode_latency": decode,
        "best_decode_latency": min(medians),
        "median_decode_throughput": batch / decode,
        "total_latency": total,
        "overall_throughput": overall,
        "step_read_bytes": read,
        "bandwidth_best": rate.best,
        "bandwidth_median": rate.median,
        "bound_pct": 100 * share,
    }


def read_bandwidth(session: Session, artifact: Artifact) -> Bandwidth | DeviceBandwidth:
    """Of a buffer of the size of the weights, by the threads that run the steps; on a GPU, of the
    weights themselves."""
    if isinstance(session, CudaSession):
        return DeviceBandwidth(Launcher(), *session.weights)
    assert isinstance(session, CpuSession)
    return Bandwidth(artifact.manifest.weights_bytes, session.call)


def main(config: LatencyConfig, sources: Mapping[str, str]) -> int:
    results.warn_if_busy()
    artifact = Artifact.open(config.artifact)
    threads = config.threads
    if artifact.manifest.target.kind == "cpu":
        threads = threads or len(os.sched_getaffinity(0))
    with closing(StaticBatch.open(artifact, threads=threads, policy=config.policy)) as static:
        if config.profile:
            profiled(static.session, artifact)
        with closing(read_bandwidth(static.session, artifact)) as buffer:
            return measure_all(static, config, artifact, buffer, threads)


def measure_all(
    static: StaticBatch,
    config: LatencyConfig,
    artifact: Artifact,
    buffer: Bandwidth | DeviceBandwidth,
    threads: int | None,
) -> int:
    """Every shape that fits, printed and recorded; the exit code."""
    capacity = static.session.capacity
    shapes = [(batch, config.input_len, config.output_len) for batch in config.batch]
    measured = 0
    print(f"max_total_num_tokens={capacity.pages * capacity.page_size}")
    for index, shape in enumerate(shapes):
        try:
            static.check(*shape)
        except TooLarge as e:
            print(f"skipping ({', '.join(map(str, shape))}) due to {e}")
            continue
        if measured == 0 and config.warmup_decode:
            print("Warmup ...")
            steps = max(2, min(config.warmup_decode, shape[2]))
            static.run(static.prompts(shape[0], shape[1], config.seed + 1 + index), steps)
        print("Benchmark ..." if len(shapes) == 1 else f"Benchmark {shape} ...")
        result = measure(static, config, artifact, buffer, shape)
        if config.profile:
            assert isinstance(buffer, Bandwidth)
            prompts = static.prompts(*shape[:2], config.seed)
            result["profile"] = profile(static, artifact, buffer, prompts, shape[2])
            print("\n".join(table(result["profile"])))
        result |= {"threads": threads, "kv_dtype": artifact.manifest.kv_dtype}
        results.append(
            config.output_file, results.stamp("latency", result, artifact=artifact.digest)
        )
        measured += 1
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(run(LatencyConfig, "bench/latency", main))
