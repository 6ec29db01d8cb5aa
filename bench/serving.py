"""Load on a running server: `python -m bench.serving url=… dataset=random num_prompts=…
request_rate=…`.

In: `ServingConfig` (conf/bench/serving.yaml). Out: the printed block, a JSON line in
`output_file`. Works against this server, SGLang (native) and any OpenAI-compatible one. Exit code
1 when no request succeeded.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from tokenizers import Tokenizer
from tqdm import tqdm

from bench import block, results, workload
from bench.client import Target, ask
from bench.errors import BenchError, BenchUsage
from bench.lag import LoopWatch
from bench.metrics import Timeline, summarise
from bench.workload import Prompt
from conf.bench_schema import ServingConfig
from conf.load import run

HEALTH_POLL = 0.25
REFUSED = ("HTTP 429", "HTTP 503", "HTTP 504")


async def get_json(session: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    """The JSON object at `url`, or None when this server has none there."""
    try:
        async with session.get(url) as response:
            if response.status in (401, 403):
                raise BenchUsage(f"{url} answered {response.status}: give the server's api_key=…")
            if response.status != 200:
                return None
            value = msgspec.json.decode(await response.read())
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
        return None
    return value if isinstance(value, dict) else None


async def wait_ready(session: aiohttp.ClientSession, url: str, seconds: float) -> None:
    """Until `/health` (or, where there is no such route, `/v1/models`) answers 200."""
    deadline = time.monotonic() + seconds
    while True:
        for path in ("/health", "/v1/models"):
            try:
                async with session.get(url + path) as response:
                    if response.status == 200:
                        return
                    if response.status not in (404, 405):
                        break  # not ready, in its own words
            except (aiohttp.ClientError, OSError, TimeoutError):
                pass  # not up yet; the deadline below decides
        if time.monotonic() >= deadline:
            raise BenchError(
                f"no server is ready at {url} after {seconds:g} s: start it or fix url="
            )
        await asyncio.sleep(HEALTH_POLL)


async def build_prompts(
    config: ServingConfig, session: aiohttp.ClientSession, tokenizer: Tokenizer | None
) -> list[Prompt]:
    count, seed = config.num_prompts, config.seed
    if config.dataset == "sharegpt-file":
        assert config.dataset_path is not None and tokenizer is not None, "_check"
        return workload.sharegpt_prompts(
            config.dataset_path, config.sharegpt, count, tokenizer, seed
        )
    vocab = config.vocab or (tokenizer.get_vocab_size() if tokenizer else None)
    if vocab is None:
        info = await get_json(session, config.url + "/get_model_info") or {}
        vocab = info.get("vocab_size")
    if not isinstance(vocab, int):
        raise BenchError(
            f"{config.url} does not tell its vocabulary: give vocab=<size> or tokenizer=<path>"
        )
    special = workload.special_tokens(tokenizer)
    if config.dataset == "random":
        prompts = workload.random_prompts(config.random, count, vocab, seed, special)
    else:
        prompts = workload.shared_prefix_prompts(config.shared_prefix, count, vocab, seed, special)
    if config.backend != "openai-chat":
        return prompts
    assert tokenizer is not None, "_check"
    return [
        Prompt(text=tokenizer.decode(list(p.tokens or ())), output_len=p.output_len)
        for p in prompts
    ]


async def drive(
    config: ServingConfig, target: Target, prompts: Sequence[Prompt], session: aiohttp.ClientSession
) -> tuple[list[Timeline], float, LoopWatch]:
    """All requests at their arrival times; the timelines in the order of the prompts, and the
    start."""
    bodies = [target.body(p) for p in prompts]
    offsets = workload.arrivals(len(prompts), config.request_rate, config.seed)
    gate = asyncio.Semaphore(config.max_concurrency or len(prompts))
    bar = tqdm(total=len(prompts), disable=not config.progress, file=sys.stderr, unit="req")

    async def one(body: bytes) -> Timeline:
        async with gate:
            timeline = await ask(session, target, body)
        bar.update(1)
        return timeline

    async with LoopWatch() as watch:
        start = time.perf_counter()
        tasks = []
        for body, offset in zip(bodies, offsets, strict=True):
            delay = start + offset - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(asyncio.create_task(one(body)))
        timelines = await asyncio.gather(*tasks)
    bar.close()
    return timelines, start, watch


# The options that one dataset alone reads.
OPTIONS_OF = {
    "random": ("random.",),
    "shared-prefix": ("shared_prefix.",),
    "sharegpt-file": ("sharegpt.", "dataset_path"),
}


def check_effect(config: ServingConfig, sources: Mapping[str, str]) -> None:
    """Refuses options of datasets that are not the chosen one. `sources`: as `conf.load` tells."""
    for dataset, prefixes in OPTIONS_OF.items():
        for key in (key for key, source in sources.items() if source == "override"):
            if dataset != config.dataset and key.startswith(prefixes):
                raise BenchUsage(
                    f"{key}={attrgetter(key)(config)}: dataset={config.dataset} does not read it; "
                    f"leave it out or take dataset={dataset}"
                )


def _check(config: ServingConfig) -> None:
    """What is wrong whatever the server answers, said before it is waited for."""
    config.url = config.url.rstrip("/")
    from_file = config.dataset == "sharegpt-file"
    if not config.url.startswith(("http://", "https://")):
        raise BenchUsage(f"url={config.url}: must start with http:// or https://")
    if from_file and None in (config.dataset_path, config.tokenizer):
        raise BenchUsage("dataset=sharegpt-file needs dataset_path=<file> and tokenizer=<path>")
    if config.dataset_path is not None and not Path(config.dataset_path).is_file():
        raise BenchUsage(f"dataset_path={config.dataset_path}: no such file")
    if config.backend == "openai-chat" and not from_file and not config.tokenizer:
        raise BenchUsage("backend=openai-chat sends text: give tokenizer=<path> to make it from")


def running_at_once(info: dict[str, Any] | None) -> int | None:
    """Sequences this server runs at once, where it tells (ours does)."""
    states = (info or {}).get("internal_states") or [None]
    capacity = states[0].get("capacity") if isinstance(states[0], dict) else None
    most = capacity.get("max_seqs") if isinstance(capacity, dict) else None
    return most if isinstance(most, int) else None


async def measure(config: ServingConfig) -> dict[str, Any]:
    """One run, as its JSON line."""
    _check(config)
    tokenizer = workload.load_tokenizer(config.tokenizer) if config.tokenizer else None
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=config.request_timeout),
        headers=headers,
        read_bufsize=1 << 20,
    ) as session:
        await wait_ready(session, config.url, config.ready_timeout)
        model = config.model
        if model is None and config.backend != "native":
            model = await first_model(session, config.url)
        target = Target(
            url=config.url,
            backend=config.backend,
            model=model,
            stream=config.stream,
            ignore_eos=config.ignore_eos,
            temperature=config.temperature,
            top_p=config.top_p,
            extra=dict(config.extra_body),
        )
        prompts = await build_prompts(config, session, tokenizer)
        await _warm_up(config, target, prompts, session)
        info = await get_json(session, config.url + "/get_server_info")
        if config.request_rate is None and config.max_concurrency is None:
            # No arrival process is being measured: more at once would only be refused.
            config.max_concurrency = running_at_once(info)
        timelines, start, watch = await drive(config, target, prompts, session)
    objectives = {k: v for k, v in asdict(config.goodput).items() if v is not None}
    result = {
        "tag": config.tag,
        "backend": config.backend,
        "dataset_name": config.dataset,
        "request_rate": config.request_rate,
        "max_concurrency": config.max_concurrency,
        "num_prompts": len(prompts),
        "random_input_len": config.random.input_len,
        "random_output_len": config.random.output_len,
        "random_range_ratio": config.random.range_ratio,
        "sharegpt_output_len": config.sharegpt.output_len,
        "seed": config.seed,
        "model": model,
        "server_info": info,
        **summarise(timelines, start, objectives),
        "client_loop_lag_p99_ms": watch.p99_ms,
        "client_cpu": watch.cpu,
        "warnings": watch.warnings(),
    }
    refused = sum(n for why, n in result["failures"].items() if why.startswith(REFUSED))
    if refused:
        result["warnings"].append(
            f"the server refused {refused} requests: lower request_rate or max_concurrency, or "
            "raise the server's limits (limits.waiting_requests, limits.queue_wait_s, "
            "limits.request_s, limits.connections_per_address)"
        )
    if tokenizer is not None:
        result["total_output_tokens_retokenized"] = sum(
            len(tokenizer.encode(t.text, add_special_tokens=False).ids) for t in timelines if t.ok
        )
    if config.output_details:
        result |= _details(timelines)
    digest = (info or {}).get("artifact_digest")  # ours tells; other servers have none
    return results.stamp("serving", result, artifact=digest if isinstance(digest, str) else None)


async def first_model(session: aiohttp.ClientSession, url: str) -> str:
    """What the server calls its model."""
    listed = await get_json(session, url + "/v1/models")
    models = (listed or {}).get("data") or []
    if not models:
        raise BenchError(f"{url}/v1/models lists no model: give model=<name>")
    return str(models[0]["id"])


async def _warm_up(
    config: ServingConfig,
    target: Target,
    prompts: Sequence[Prompt],
    session: aiohttp.ClientSession,
) -> None:
    """Requests that are not measured; the first must succeed, or the run would measure errors."""
    for _ in range(config.warmup_requests):
        answer = await ask(session, target, target.body(prompts[0]))
        if not answer.ok:
            raise BenchError(f"the warm-up request to {target.endpoint} failed: {answer.error}")
    if config.flush_cache:
        async with session.post(config.url + "/flush_cache") as response:
            if response.status != 200:
                raise BenchError(
                    f"{config.url}/flush_cache answered {response.status}: run without flush_cache"
                )


def _details(timelines: Sequence[Timeline]) -> dict[str, Any]:
    return {
        "input_lens": [t.prompt_tokens for t in timelines],
        "output_lens": [t.output_tokens for t in timelines],
        "ttfts": [t.ttft if t.arrivals else 0.0 for t in timelines],
        "itls": [t.itls for t in timelines],
        "generated_texts": [t.text for t in timelines],
        "errors": [t.error or "" for t in timelines],
    }


def main(config: ServingConfig, sources: Mapping[str, str]) -> int:
    check_effect(config, sources)
    result = asyncio.run(measure(config))
    results.append(config.output_file, result)
    print(block.render(result))
    return 0 if result["completed"] else 1


if __name__ == "__main__":
    sys.exit(run(ServingConfig, "bench/serving", main))
