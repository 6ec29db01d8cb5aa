"""The whole road per family, on the real device: a checkpoint saved by transformers is compiled,
run through scheduler, plan and kernels, and compared with the model it came from: log-probabilities
of prompts (in chunks) and of generated tokens, several sequences in one ragged batch, and greedy
tokens over HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import toy_models
from serving import serving

from compiler.pipeline import compile_model
from compiler.progress import Progress
from conf.load import load
from conf.schema import CompileConfig
from runtime.artifact import Artifact
from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.device.base import open_session
from runtime.request import Event, Request, SamplingParams

pytest.importorskip("transformers")
# Longer than a step, than a page (16 tokens both) and than every window (4).
PROMPTS = [[(7 * i * i + 3 * i + s) % 128 for i in range(n)] for s, n in enumerate((40, 5, 23, 1))]
NEW = 8
CASES = [
    pytest.param(recipe, id=f"{family}-{recipe.label}")
    for family, recipes in toy_models.RECIPES.items()
    for recipe in recipes
]


@dataclass
class Subject:
    model: Any
    artifact: Artifact

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[position, vocabulary]: of the token after each position."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    def greedy(self, prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(NEW):
            tokens.append(int(self.logprobs(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    source, out = tmp_path_factory.mktemp("toy"), tmp_path_factory.mktemp("artifact")
    model = toy_models.save(request.param, source)
    overrides = ["model=hf", f"model.source={source}", "dtype=float32", "name=toy", f"out={out}"]
    shape = ["shape.context=128", "shape.max_tokens=16", "shape.max_seqs=8"]
    loaded = load(CompileConfig, "compile", [*overrides, *shape])
    path = compile_model(loaded.config, loaded.sources, Progress())
    return Subject(model, Artifact.open(path))


def run(artifact: Artifact, prompts: list[list[int]], *, score: bool) -> list[Event]:
    """All prompts at once; one event per prompt with everything that was heard of it."""
    session = open_session(artifact, kv_tokens=1024)
    options = EngineOptions(artifact=str(artifact.path), prefix_cache=not score)
    loop = EngineLoop(session, options, eos=())
    sampling = SamplingParams(max_new_tokens=NEW, temperature=0.0)
    for id, tokens in enumerate(prompts):
        start = 0 if score else -1
        request = Request(
            id=id, tokens=tokens, sampling=sampling, logprobs=True, prompt_logprobs_from=start
        )
        loop.add(request)
    heard = [Event(id=id) for id in range(len(prompts))]
    while loop.has_work:
        for event in loop.step():
            assert event.finish is None or event.finish.reason == "length", event.finish
            so_far = heard[event.id]
            heard[event.id] = Event(
                id=event.id,
                tokens=so_far.tokens + event.tokens,
                logprobs=so_far.logprobs + event.logprobs,
                prompt_logprobs=so_far.prompt_logprobs + event.prompt_logprobs,
            )
    loop.close()
    return heard


def test_logprobs_of_prompt_and_output(subject: Subject) -> None:
    for prompt, event in zip(PROMPTS, run(subject.artifact, PROMPTS, score=True), strict=True):
        everything = prompt + event.tokens
        table = subject.logprobs(everything)
        expected = [float(table[i - 1, t]) for i, t in enumerate(everything) if i > 0]
        found = [p for p in event.prompt_logprobs if p is not None] + event.logprobs
        assert found == pytest.approx(expected, abs=1e-4)
        assert event.tokens == subject.greedy(prompt)


def test_batch_changes_no_token(subject: Subject) -> None:
    together = run(subject.artifact, PROMPTS, score=False)
    for prompt, event in zip(PROMPTS, together, strict=True):
        assert run(subject.artifact, [prompt], score=False)[0].tokens == event.tokens


def test_greedy_tokens_over_http(subject: Subject) -> None:
    with serving(subject.artifact.path, "device=auto") as server:
        body = {"sampling_params": {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}}
        reply = server.generate(input_ids=PROMPTS, **body)
    assert reply.status == 200, reply.body
    assert [one["output_ids"] for one in reply.json] == [subject.greedy(p) for p in PROMPTS]
