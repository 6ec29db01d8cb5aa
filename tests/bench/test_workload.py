"""Datasets and arrivals: seeded, of the asked lengths, with the asked statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from bench import workload
from bench.errors import BenchError
from conf.bench_schema import RandomDataset, SharedPrefixDataset, ShareGptDataset


@pytest.fixture
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>"])
    return made


def test_poisson() -> None:
    times = workload.arrivals(20_000, 50.0, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps >= 0).all()
    # An exponential law: mean 1/rate, standard deviation equal to it, P(gap > mean) = 1/e.
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.05)
    assert (gaps > 0.02).mean() == pytest.approx(np.exp(-1), abs=0.02)
    assert (times == workload.arrivals(20_000, 50.0, seed=1)).all()
    assert (times != workload.arrivals(20_000, 50.0, seed=2))[1:].all()


def test_no_rate_is_all_at_once() -> None:
    assert workload.arrivals(5, None, seed=0).tolist() == [0.0] * 5


def test_random_lengths() -> None:
    options = RandomDataset(input_len=64, output_len=20, range_ratio=0.5)
    prompts = workload.random_prompts(options, 300, vocab=50, seed=3, special=frozenset({7}))
    inputs = {len(p.tokens or ()) for p in prompts}
    outputs = {p.output_len for p in prompts}
    assert (min(inputs), max(inputs)) == (32, 64)
    assert (min(outputs), max(outputs)) == (10, 20)
    used = {t for p in prompts for t in p.tokens or ()}
    assert used == set(range(50)) - {7}
    assert prompts == workload.random_prompts(options, 300, 50, 3, frozenset({7}))


def test_shared_prefix() -> None:
    options = SharedPrefixDataset(
        groups=3, prompts_per_group=4, system_len=16, question_len=5, output_len=9
    )
    prompts = workload.shared_prefix_prompts(options, 12, vocab=1000, seed=0)
    prefixes = [(p.tokens or ())[:16] for p in prompts]
    assert len(set(prefixes)) == 3
    assert all(prefixes.count(p) == 4 for p in prefixes)
    assert len({p.tokens for p in prompts}) == 12
    assert {(len(p.tokens or ()), p.output_len) for p in prompts} == {(21, 9)}
    with pytest.raises(BenchError, match="num_prompts=13"):
        workload.shared_prefix_prompts(options, 13, vocab=1000, seed=0)


def test_sharegpt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def talk(*turns: str) -> dict:
        return {"conversations": [{"from": "human", "value": t} for t in turns]}

    path = tmp_path / "talks.json"
    talks = [
        talk("a a a a a", "a a a a a a"),
        talk("short", "a a a a a"),  # question of one token: left out
        talk("a a a a a"),  # no answer
        talk("a " * 3000, "a a a a a"),  # too long
        {"id": "nothing"},
    ]
    path.write_text(json.dumps(talks))
    prompts = workload.sharegpt_prompts(str(path), ShareGptDataset(), 2, tokenizer, seed=0)
    assert [(p.text, p.output_len) for p in prompts] == [("a a a a a", 6)] * 2
    fixed = workload.sharegpt_prompts(str(path), ShareGptDataset(output_len=33), 1, tokenizer, 0)
    assert fixed[0].output_len == 33


@pytest.mark.parametrize("content", ["not json", "{}", "[]"])
def test_sharegpt_refuses(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    path = tmp_path / "talks.json"
    path.write_text(content)
    with pytest.raises(BenchError, match=r"talks\.json"):
        workload.sharegpt_prompts(str(path), ShareGptDataset(), 1, tokenizer, 0)


def test_tokenizer_places(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "text").mkdir()
    tokenizer.save(str(tmp_path / "text" / "tokenizer.json"))
    loaded = workload.load_tokenizer(str(tmp_path))
    assert loaded.get_vocab_size() == 3
    assert workload.special_tokens(loaded) == {2}
    with pytest.raises(BenchError, match=r"no tokenizer\.json"):
        workload.load_tokenizer(str(tmp_path / "elsewhere"))
