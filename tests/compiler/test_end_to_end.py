"""The whole road per family, on the real device: a checkpoint saved by transformers is compiled,
run through scheduler, plan and kernels, and compared with the model it came from: log-probabilities
of prompts (in chunks) and of generated tokens, several sequences in one ragged batch, and greedy
tokens over HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import toy_models
from serving import serving
from toy_references import Reference

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
    pytest.param(form, id=f"{family}-{form.label}")
    for family, recipes in toy_models.RECIPES.items()
    for recipe in recipes
    for form in recipe.forms()
]


@dataclass
class Subject:
    reference: Reference
    artifact: Artifact

    def check_greedy(self, prompt: list[int], tokens: list[int]) -> None:
        """Each token is the best one after those before it."""
        table = self.reference.logits([*prompt, *tokens], len(prompt))
        assert tokens == table[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return compiled(request.param, tmp_path_factory.mktemp("toy"))


def compiled(recipe: toy_models.Recipe, directory: Path) -> Subject:
    source, out = directory / "source", directory / "artifacts"
    reference = toy_models.save(recipe, source)
    overrides = ["model=hf", f"model.source={source}", "dtype=float32", "name=toy", f"out={out}"]
    shape = ["shape.context=128", "shape.max_tokens=16", "shape.max_seqs=8"]
    loaded = load(CompileConfig, "compile", [*overrides, *shape, *recipe.options])
    path = compile_model(loaded.config, loaded.sources, Progress())
    return Subject(reference, Artifact.open(path))


def open_loop(artifact: Artifact, *, prefix_cache: bool, kv_tokens: int = 1024) -> EngineLoop:
    session = open_session(artifact, kv_tokens=kv_tokens)
    options = EngineOptions(artifact=str(artifact.path), prefix_cache=prefix_cache)
    return EngineLoop(session, options, eos=())


def request(id: int, tokens: list[int], *, score: bool = False, new: int = NEW) -> Request:
    sampling = SamplingParams(max_new_tokens=new, temperature=0.0)
    start = 0 if score else -1
    return Request(
        id=id, tokens=tokens, sampling=sampling, logprobs=True, prompt_logprobs_from=start
    )


def hear(loop: EngineLoop, requests: list[Request]) -> list[Event]:
    """All requests at once; one event per request with everything that was heard of it."""
    for one in requests:
        loop.add(one)
    heard = {one.id: Event(id=one.id) for one in requests}
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
    return list(heard.values())


def run(artifact: Artifact, prompts: list[list[int]], *, score: bool) -> list[Event]:
    loop = open_loop(artifact, prefix_cache=not score)
    heard = hear(loop, [request(id, p, score=score) for id, p in enumerate(prompts)])
    loop.idle()  # checks the books
    loop.close()
    return heard


def test_logprobs_of_prompt_and_output(subject: Subject) -> None:
    for prompt, event in zip(PROMPTS, run(subject.artifact, PROMPTS, score=True), strict=True):
        everything = prompt + event.tokens
        table = subject.reference.logprobs(everything, len(prompt))
        expected = [float(table[i - 1, t]) for i, t in enumerate(everything) if i > 0]
        found = [p for p in event.prompt_logprobs if p is not None] + event.logprobs
        assert found == pytest.approx(expected, abs=1e-4)
        best = table[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert event.tokens == best  # greedy, and so is what the reference would say


def test_batch_changes_no_token(subject: Subject) -> None:
    together = run(subject.artifact, PROMPTS, score=False)
    for prompt, event in zip(PROMPTS, together, strict=True):
        assert run(subject.artifact, [prompt], score=False)[0].tokens == event.tokens


def test_prefixes_are_reused_where_their_keys_are_the_same(subject: Subject) -> None:
    """A long prompt, its beginning, and a longer one, one after another on one pool: what is found
    in the cache must be what would have been computed."""
    long = PROMPTS[0]
    cases = [long, long[:20], [*long[:33], 7, 7, 7], [*long, 5]]
    loop = open_loop(subject.artifact, prefix_cache=True)
    for id, prompt in enumerate(cases):
        subject.check_greedy(prompt, hear(loop, [request(id, prompt)])[0].tokens)
    # Where rope depends on the length, only prompts with the same rope share pages.
    reused = loop.scheduler.count.cached_tokens
    rule = subject.artifact.manifest.model.rope_rule
    expected = {None: 16 + 32 + 32, "prompt": 32 + 32, "sequence": 32 + 32, "token": 0}
    assert reused == expected[rule.of if rule else None]
    loop.close()


BY_LENGTH = [case for case in CASES if case.id in ("llama-dynamic", "phi3-longrope")]


@pytest.mark.parametrize("recipe", BY_LENGTH)
def test_a_preempted_sequence_is_computed_again_with_its_own_rope(
    recipe: toy_models.Recipe, tmp_path: Path
) -> None:
    subject = compiled(recipe, tmp_path)
    loop = open_loop(subject.artifact, prefix_cache=True, kv_tokens=96)
    prompts = [PROMPTS[0][i : i + 14] for i in range(3)]
    heard = hear(loop, [request(id, prompt, new=40) for id, prompt in enumerate(prompts)])
    assert loop.scheduler.count.retractions, "the pool was too large for this test"
    for prompt, event in zip(prompts, heard, strict=True):
        subject.check_greedy(prompt, event.tokens)
    loop.idle()
    loop.close()


def test_greedy_tokens_over_http(tmp_path: Path) -> None:
    """One family: nothing above the program knows which it is."""
    subject = compiled(toy_models.RECIPES["llama"][0], tmp_path)
    with serving(subject.artifact.path, "device=auto") as server:
        body = {"sampling_params": {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}}
        reply = server.generate(input_ids=PROMPTS, **body)
    assert reply.status == 200, reply.body
    expected = [subject.reference.greedy(p, NEW) for p in PROMPTS]
    assert [one["output_ids"] for one in reply.json] == expected
