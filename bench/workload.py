"""What a serving benchmark sends and when: seeded dataset builders and the arrival process.

A `Prompt` is token ids or text with the number of tokens to generate; `arrivals` gives the seconds
at which they are sent.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from bench.errors import BenchError, BenchUsage
from conf.bench_schema import RandomDataset, SharedPrefixDataset, ShareGptDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """`tokens` when the content does not matter or the ids are known; `text` otherwise (exactly one
    of them)."""

    output_len: int
    tokens: tuple[int, ...] | None = None
    text: str | None = None


def arrivals(count: int, rate: float | None, seed: int) -> npt.NDArray[np.float64]:
    """Seconds from the start at which each request is sent: Poisson at `rate` per second, or all at
    0."""
    if rate is None:
        return np.zeros(count)
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, count)
    gaps[0] = 0.0
    return np.cumsum(gaps)


def load_tokenizer(path: str) -> Tokenizer:
    """A tokenizer.json, a directory with one, or an artifact (text/tokenizer.json)."""
    place = Path(path)
    candidates = (place, place / "tokenizer.json", place / "text" / "tokenizer.json")
    for file in candidates:
        if file.is_file():
            return Tokenizer.from_file(str(file))
    raise BenchUsage(f"tokenizer={path}: no tokenizer.json there; give its path or an artifact's")


def _token_ids(
    rng: np.random.Generator, length: int, vocab: int, special: frozenset[int]
) -> tuple[int, ...]:
    """`length` random ordinary tokens."""
    ids = rng.integers(0, vocab, length)
    for i in np.flatnonzero(np.isin(ids, list(special))) if special else ():
        while int(ids[i]) in special:
            ids[i] = rng.integers(0, vocab)
    return tuple(ids.tolist())


def special_tokens(tokenizer: Tokenizer | None) -> frozenset[int]:
    """Control tokens, which random prompts leave out: servers may treat them specially."""
    if tokenizer is None:
        return frozenset()
    return frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)


def random_prompts(
    options: RandomDataset, count: int, vocab: int, seed: int, special: frozenset[int] = frozenset()
) -> list[Prompt]:
    """Random token ids; input and output lengths uniform in [range_ratio x length, length]."""
    rng = np.random.default_rng(seed)

    def lengths(longest: int) -> npt.NDArray[np.int64]:
        return rng.integers(max(1, int(longest * options.range_ratio)), longest + 1, count)

    inputs, outputs = lengths(options.input_len), lengths(options.output_len)
    return [
        Prompt(tokens=_token_ids(rng, int(i), vocab, special), output_len=int(o))
        for i, o in zip(inputs, outputs, strict=True)
    ]


def shared_prefix_prompts(
    options: SharedPrefixDataset,
    count: int,
    vocab: int,
    seed: int,
    special: frozenset[int] = frozenset(),
) -> list[Prompt]:
    """Groups of prompts that begin with the same system prompt, shuffled; the first `count` of
    them."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(options.groups):
        system = _token_ids(rng, options.system_len, vocab, special)
        for _ in range(options.prompts_per_group):
            question = _token_ids(rng, options.question_len, vocab, special)
            prompts.append(Prompt(tokens=system + question, output_len=options.output_len))
    if count > len(prompts):
        raise BenchError(
            f"num_prompts={count} but groups x prompts_per_group is {len(prompts)}: "
            "lower the one or raise the others"
        )
    order = rng.permutation(len(prompts))
    return [prompts[i] for i in order[:count]]


def sharegpt_prompts(
    path: str, options: ShareGptDataset, count: int, tokenizer: Tokenizer, seed: int
) -> list[Prompt]:
    """First turns of a ShareGPT JSON file, in seeded order; the answer's length is the number of
    tokens to generate."""
    rng = np.random.default_rng(seed)
    turns = [pair for item in _read_json(path) if (pair := _first_turns(item)) is not None]
    rng.shuffle(turns)
    prompts: list[Prompt] = []
    for question, answer in turns:
        if len(prompts) == count:
            break
        input_len = len(tokenizer.encode(question).ids)
        output_len = options.output_len or len(tokenizer.encode(answer).ids)
        limit = options.context_len or 2048
        # The published filter: too short says nothing, too long does not fit the usual context.
        if input_len < 4 or output_len < 4 or input_len + output_len > limit:
            continue
        prompts.append(Prompt(text=question, output_len=output_len))
    if not prompts:
        raise BenchError(f"{path}: no conversation of two turns within the length limits")
    return list(itertools.islice(itertools.cycle(prompts), count))


def _read_json(path: str) -> list[Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise BenchUsage(f"dataset_path={path}: {e.strerror}") from None
    except ValueError as e:
        raise BenchUsage(f"dataset_path={path} is not JSON: {e}") from None
    if not isinstance(data, list):
        raise BenchUsage(f"dataset_path={path} holds {type(data).__name__}, not a list")
    return data


def _first_turns(item: Any) -> tuple[str, str] | None:
    turns: Any = None
    if isinstance(item, dict):
        turns = item.get("conversations", item.get("conversation"))
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    first, second = (t.get("value", t.get("content")) for t in turns[:2])
    return (first, second) if isinstance(first, str) and isinstance(second, str) else None
