"""Constrained sequences, from the worker that follows their grammars to what the engine says of
them. On the null device, whose tokens are arbitrary: only the masks make them fit.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from toy_artifact import VOCAB, toy_tokenizer

from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.device.null import ALONE, NullSession
from runtime.engine import Engine
from runtime.errors import InvalidRequest
from runtime.grammar.cache import LEAST, GrammarCache
from runtime.grammar.client import ENDED, Grammars
from runtime.grammar.messages import COMPLETE, FAILED, GOES_ON, WorkerOptions
from runtime.request import Event, Finish, Grammar, Request, SamplingParams

EOS = (2,)
CODE = Grammar(kind="regex", text="[a-z]{3}-[0-9]{2}")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TAG = {
    "structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}],
    "triggers": ["<f"],
}
# Minutes of work in 700 bytes: states of the intersection of forty languages.
BOMB = "start: T\nT: " + " & ".join(f"/(.*a.{{{i}}}.*)/" for i in range(20, 60)) + "\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return toy_tokenizer()


def grammars(tokenizer: Tokenizer, **options: object) -> Grammars:
    document = tokenizer.to_str().encode()
    given = {"vocab": VOCAB, "eos": EOS, "slots": 8, **options}
    return Grammars(lambda: document, WorkerOptions(**given))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = grammars(tokenizer)
    yield made
    made.close()


def outcome(made: Grammars, id_: int, grammar: Grammar) -> str | None:
    """Why it is refused, or None."""
    made.open(id_, grammar)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        for found, why, _ in made.poll(0.01):
            assert found == id_
            return why
    raise AssertionError("no answer")


def allowed(made: Grammars, slot: int) -> set[int]:
    bits = np.unpackbits(made.masks[slot].view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


# --- the worker ---------------------------------------------------------------------------------


def test_masks_follow_the_tokens_to_the_end(shared: Grammars, tokenizer: Tokenizer) -> None:
    assert outcome(shared, 1, Grammar(kind="regex", text="ab?[0-9]")) is None
    a, b, seven = (tokenizer.token_to_id(c) for c in "ab7")
    assert shared.advance([(1, -1, 3)]) == [(GOES_ON, "")]
    assert allowed(shared, 3) == {a}
    assert shared.advance([(1, a, 3)]) == [(GOES_ON, "")]
    assert {b, seven} <= allowed(shared, 3) and a not in allowed(shared, 3)
    assert shared.advance([(1, seven, 3)]) == [(COMPLETE, "")]
    shared.forget([1])
    assert shared.advance([(1, a, 3)])[0][0] == FAILED


def test_many_sequences_of_one_grammar_are_apart(shared: Grammars, tokenizer: Tokenizer) -> None:
    ids = {c: tokenizer.token_to_id(c) for c in "xyz"}
    for n, c in enumerate("xyz"):
        assert outcome(shared, 10 + n, Grammar(kind="regex", text="[xyz]!{2}")) is None
        assert shared.advance([(10 + n, ids[c], n)])[0][0] == GOES_ON
    mark = tokenizer.token_to_id("!")
    assert shared.advance([(10, mark, 0), (11, -1, 1), (12, mark, 2)]) == [(GOES_ON, "")] * 3
    assert shared.advance([(10, mark, 0), (11, mark, 1), (12, ids["x"], 2)])[0] == (COMPLETE, "")
    shared.forget([10, 11, 12])


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("regex", "[a-", "unclosed character class"),
        ("regex", "(?=a)b", "look-around"),
        ("json_schema", '{"type": ', "line 1 column"),
        ("json_schema", "[1]", "must be a JSON object"),
        ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
        ("json_schema", '{"$ref": "#"}', "allows nothing"),
        ("json_schema", '{"type":"array","items":' * 2000 + "{}" + "}" * 2000, "recursion"),
        ("ebnf", "root ::= foo", "Rule 'foo' not found"),
        ("ebnf", "root ::= " + "(" * 20000 + '"a"' + ")" * 20000, "recursion"),
        ("structural_tag", "{}", "expected"),
        ("structural_tag", json.dumps(TAG | {"triggers": ["<g"]}), "no trigger begins '<f>'"),
        ("structural_tag", json.dumps({"type": "structural_tag", "format": {}}), "expected"),
    ],
)
def test_what_is_wrong_with_a_grammar_is_said(
    shared: Grammars, kind: str, text: str, why: str
) -> None:
    said = outcome(shared, 99, Grammar(kind=kind, text=text))  # type: ignore[arg-type]
    assert said is not None and said.startswith(f"{kind} is refused: ") and why in said
    assert len(said) < 400 and "\n" not in said


def test_a_bomb_is_killed_while_others_go_on(tokenizer: Tokenizer) -> None:
    made = grammars(tokenizer, seconds=0.5, memory=64 << 20)
    assert outcome(made, 1, CODE) is None
    began = time.monotonic()
    made.open(2, Grammar(kind="ebnf", text=BOMB))
    waits, heard = [], []
    while not heard:
        start = time.monotonic()
        assert made.advance([(1, -1, 0)]) == [(GOES_ON, "")]
        waits.append(time.monotonic() - start)
        heard = made.poll(0)
    assert time.monotonic() - began < 0.5 + 2.0
    assert len(waits) > 20, "the worker answered all the time"
    assert heard[0][0] == 2 and "does not compile within" in str(heard[0][1])  # 0.5 s or 64 MiB
    again = time.monotonic()
    assert "within" in str(outcome(made, 3, Grammar(kind="ebnf", text=BOMB)))
    assert time.monotonic() - again < 0.4, "known by now"
    doubling = 'root ::= r19\nr0 ::= "a"\n' + "".join(
        f"r{i + 1} ::= r{i} r{i}\n" for i in range(19)
    )
    assert "within" in str(outcome(made, 4, Grammar(kind="ebnf", text=doubling)))
    assert made.advance([(1, -1, 0)]) == [(GOES_ON, "")]
    made.close()


def test_a_dead_worker_ends_its_sequences_and_is_replaced(tokenizer: Tokenizer) -> None:
    made = grammars(tokenizer)
    assert outcome(made, 1, CODE) is None
    assert made._child is not None
    os.kill(made._child.pid, signal.SIGKILL)
    made._child.wait()
    assert made.advance([(1, -1, 0)]) == [(FAILED, ENDED)]
    assert outcome(made, 2, CODE) is None
    assert made.advance([(1, -1, 0), (2, -1, 1)])[1] == (GOES_ON, "")
    before = allowed(made, 1)
    os.kill(made._child.pid, signal.SIGKILL)
    made._child.wait()
    assert outcome(made, 3, CODE) is None, "a request that finds it dead starts another"
    assert before and allowed(made, 1) == before, "what a step was promised still holds"
    assert made.advance([(2, -1, 1), (3, -1, 0)]) == [
        (FAILED, "the grammar worker was restarted"),
        (GOES_ON, ""),
    ]
    made.close()


def test_nobody_waits_behind_what_is_forgotten(tokenizer: Tokenizer) -> None:
    made = grammars(tokenizer)
    for id_ in range(1, 200):
        made.open(id_, Grammar(kind="ebnf", text=BOMB))
        made.forget([id_])
    assert outcome(made, 200, CODE) is None
    made.close()


def test_a_tokenizer_that_cannot_be_constrained_is_said_once_and_for_all() -> None:
    made = Grammars(lambda: b'{"no": "tokenizer"}', WorkerOptions(vocab=9, eos=(), slots=2))
    for id_ in (1, 2):
        assert "cannot be constrained" in str(outcome(made, id_, CODE))
    none = Grammars(lambda: None, WorkerOptions(vocab=9, eos=(), slots=2))
    assert "no tokenizer" in str(outcome(none, 1, CODE))


def test_a_memory_limit_never_asks_for_more_than_there_is() -> None:
    program = """
from resource import RLIMIT_AS, getrlimit, setrlimit
from runtime.grammar.trial import limit_memory
setrlimit(RLIMIT_AS, (1 << 36, 1 << 36))
limit_memory(1 << 40)
assert getrlimit(RLIMIT_AS) == (1 << 36, 1 << 36)
limit_memory(1 << 24)
assert getrlimit(RLIMIT_AS)[1] < 1 << 36
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_cache_is_bounded_in_bytes_and_forgets_the_oldest() -> None:
    def size(text: str) -> int:
        return LEAST + 4 * len(text)

    cache = GrammarCache(3 * size("abc"))
    keys = [Grammar(kind="regex", text=f"ab{i}") for i in range(5)]
    for key in keys[:3]:
        cache.put(key, "no", 0)
    assert cache.get(keys[0]) == "no" and cache.bytes == 3 * size("abc")
    cache.put(keys[3], "no", 0)
    assert cache.get(keys[1]) is None and cache.get(keys[0]) is not None
    cache.put(keys[4], "no", 10 << 20)
    assert cache.get(keys[4]) is None and len(cache) == 3
    assert cache.get(Grammar(kind="ebnf", text="ab0")) is None, "the kind is part of the key"


# --- the engine ---------------------------------------------------------------------------------


class Run:
    """A loop on the null device and what its requests got."""

    def __init__(self, tokenizer: Tokenizer, **options: object) -> None:
        capacity = replace(ALONE, vocab=VOCAB, slots=8, max_seqs=8, max_tokens=64)
        capacity = replace(capacity, pages=int(options.pop("pages", 256)))  # type: ignore[arg-type]
        self.loop = EngineLoop(
            NullSession(capacity, strict=True),
            EngineOptions(artifact="", device="null", seed=5, **options),  # type: ignore[arg-type]
            eos=EOS,
            grammars=grammars(tokenizer, slots=capacity.slots),
        )
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Finish] = {}
        self.retractions = 0

    def __call__(self, *requests: Request) -> Run:
        for request in requests:
            self.loop.add(request)
        end = time.monotonic() + 30
        while self.loop.has_work and time.monotonic() < end:
            for event in self.loop.step():
                self.feed(event)
        assert not self.loop.has_work
        self.loop.idle()  # checks the books
        self.loop.close()
        return self

    def feed(self, event: Event) -> None:
        self.tokens.setdefault(event.id, []).extend(event.tokens)
        if event.finish is not None:
            self.ends[event.id] = event.finish
            self.retractions += event.retractions


def request(id_: int, grammar: Grammar | None = None, **sampling: object) -> Request:
    given = {"max_new_tokens": 60, "seed": id_, "ignore_eos": grammar is None, **sampling}
    params = SamplingParams(grammar=grammar, **given)  # type: ignore[arg-type]
    return Request(id=id_, tokens=[5, 6, 7, 8 + id_], sampling=params)


def test_outputs_match_their_grammars_and_others_do_not_change(tokenizer: Tokenizer) -> None:
    free = [request(i) for i in (1, 2)]
    alone = Run(tokenizer)(*free)
    schema = Grammar(kind="json_schema", text=json.dumps(PERSON))
    answer = Grammar(kind="ebnf", text='root ::= "yes" | "no"')
    bound = [request(10 + i, CODE, temperature=i / 2) for i in range(3)]
    bound += [request(20 + i, schema, max_new_tokens=500) for i in range(2)]
    bound += [request(30 + i, answer) for i in range(3)]
    run = Run(tokenizer)(*free, *bound)
    for r in free:
        assert run.tokens[r.id] == alone.tokens[r.id]
        assert run.ends[r.id].reason == "length"
    texts = {i: tokenizer.decode(tokens) for i, tokens in run.tokens.items()}
    for r in bound:
        assert run.ends[r.id] == Finish(reason="stop"), texts[r.id]
    for i in (10, 11, 12):
        assert re.fullmatch(CODE.text, texts[i])
    assert len({texts[i] for i in (11, 12)}) == 2
    for i in (20, 21):
        person = json.loads(texts[i])
        assert set(person) == {"name", "age"} and isinstance(person["age"], int)
    assert {texts[i] for i in (30, 31, 32)} <= {"yes", "no"}
    assert run.loop.scheduler.count.steps > 0 and run.loop.stats().waiting_grammars == 0


@pytest.mark.parametrize("options", [{"pages": 5}, {"max_step_tokens": 8}, {"overlap": False}])
def test_preemption_chunks_and_stepping_change_nothing(tokenizer: Tokenizer, options: dict) -> None:
    wanted = [request(i, Grammar(kind="regex", text="([a-z]+ ){12}")) for i in range(3)]
    wanted = [*wanted, request(7)]
    plain, run = Run(tokenizer)(*wanted), Run(tokenizer, **options)(*wanted)
    assert run.tokens == plain.tokens and run.ends == plain.ends
    assert bool(run.retractions) == ("pages" in options)


def test_a_text_that_may_end_ends_at_eos_or_its_limit(tokenizer: Tokenizer) -> None:
    word = Grammar(kind="regex", text="[a-z]*")
    run = Run(tokenizer)(
        request(1, word, logit_bias={2: 100.0}),
        request(2, word, logit_bias={2: -100.0}, max_new_tokens=9),
        request(3, word, logit_bias={2: 100.0}, min_new_tokens=4, max_new_tokens=9),
        request(4, Grammar(kind="regex", text="ok"), min_new_tokens=5),
    )
    assert run.ends[1] == Finish(reason="stop", matched=2) and run.tokens[1] == [2]
    assert run.ends[2].reason == "length" and len(run.tokens[2]) == 9
    assert run.ends[3].matched == 2 and len(run.tokens[3]) == 5
    assert run.ends[4] == Finish(reason="stop"), "it cannot grow, whatever min_new_tokens says"
    assert tokenizer.decode(run.tokens[4]) == "ok"


def test_a_request_that_leaves_no_token_ends_alone(tokenizer: Tokenizer) -> None:
    a = tokenizer.token_to_id("a")
    run = Run(tokenizer)(
        request(1, Grammar(kind="regex", text="a"), logit_bias={a: -100.0}),
        request(2, Grammar(kind="regex", text="[")),
        request(3, CODE),
    )
    assert run.ends[1].reason == "abort" and run.ends[1].status == 400
    assert "leave no token" in str(run.ends[1].message)
    assert run.ends[2].status == 400 and "regex is refused" in str(run.ends[2].message)
    assert run.ends[3].reason == "stop"


def test_aborts_and_drains_while_a_grammar_compiles(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer)
    run.loop.add(request(1, Grammar(kind="ebnf", text=BOMB)))
    run.loop.add(request(2, CODE))
    assert run.loop.stats().waiting_grammars == 2 and run.loop.has_work
    run.loop.abort(1)
    run.loop.abort(2)
    run(request(3))
    assert [run.ends[i].reason for i in (1, 2, 3)] == ["abort", "abort", "length"]
    assert run.loop.grammars is not None and not run.loop.grammars._queue


def test_a_second_request_of_a_running_id_leaves_the_first_alone(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer)
    run.loop.add(request(1, CODE))
    while 1 not in run.loop.scheduler.live:
        run.loop.step()
    run.loop.add(request(1, Grammar(kind="regex", text="x")))
    assert not run.loop._compiling
    refusals = [event for event in run.loop.step() if event.finish is not None]
    assert [e.finish.status for e in refusals if e.finish is not None] == [400]
    run()
    assert run.ends[1] == Finish(reason="stop")


def test_a_worker_that_cannot_start_refuses_the_request_and_no_more(tokenizer: Tokenizer) -> None:
    def damaged() -> bytes:
        raise OSError("damaged")

    run = Run(tokenizer)
    run.loop.grammars = Grammars(damaged, WorkerOptions(vocab=VOCAB, eos=EOS, slots=8))
    run(request(1, CODE), request(2))
    assert run.ends[1].status == 500 and run.ends[2].reason == "length"


def test_without_a_tokenizer_a_grammar_is_refused(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer)
    run.loop.grammars = None
    run(request(1, CODE), request(2))
    assert run.ends[1].status == 400 and run.ends[2].reason == "length"


# --- a real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_artifact: Path) -> Iterator[Engine]:
    with Engine(artifact=str(tiny_artifact), threads=1, kv_tokens=4096) as made:
        yield made


def test_a_model_writes_what_its_grammar_allows(engine: Engine) -> None:
    plain = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    prompt = "The license"
    alone = engine.generate(prompt, plain)["output_ids"]
    cases: list[dict] = [plain]
    for seed, temperature in ((1, 0.0), (2, 0.7), (3, 1.5)):
        draw = {"temperature": temperature, "sampling_seed": seed, "max_new_tokens": 200}
        cases.append({**draw, "regex": "[A-Z][a-z]{2,8} [0-9]{4}", "top_k": 40, "top_p": 0.9})
        cases.append({**draw, "json_schema": json.dumps(PERSON), "frequency_penalty": 0.3})
    outs = engine.generate([prompt] * len(cases), cases)
    assert outs[0]["output_ids"] == alone
    for case, out in zip(cases[1:], outs[1:], strict=True):
        assert out["meta_info"]["finish_reason"] == {"type": "stop", "matched": None}, out["text"]
        if "regex" in case:
            assert re.fullmatch(case["regex"], out["text"])
        else:
            assert set(json.loads(out["text"])) == {"name", "age"}


def test_n_streams_stops_and_logprobs(engine: Engine) -> None:
    params = {"regex": "[a-z]{5};[a-z]{5}", "n": 3, "sampling_seed": 4, "temperature": 1.2}
    outs = engine.generate("A", params, return_logprob=True, top_logprobs_num=2)
    assert all(re.fullmatch(params["regex"], out["text"]) for out in outs)
    assert len({out["text"] for out in outs}) > 1
    for out in outs:
        assert len(out["meta_info"]["output_token_logprobs"]) == len(out["output_ids"])
        assert all(p <= 0 for p, *_ in out["meta_info"]["output_token_logprobs"])
    one = {**params, "n": 1}
    last = list(engine.generate("A", one, stream=True))[-1]
    assert last["text"] == outs[0]["text"]
    stopped = engine.generate("A", {**one, "stop": ";"})
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": ";"}
    assert stopped["text"] == outs[0]["text"].partition(";")[0]


def test_an_invalid_grammar_is_the_callers_error(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="regex is refused: error: unclosed") as refused:
        engine.generate("A", {"regex": "["})
    assert refused.value.status == 400
    with pytest.raises(InvalidRequest, match="Only one of json_schema, regex, ebnf, or struct"):
        engine.generate("A", {"regex": "a", "ebnf": 'root ::= "a"'})
    with pytest.raises(InvalidRequest, match="regex is 5000 bytes, over the 4096-byte limit"):
        engine.generate("A", {"regex": "a" * 5000})
    with pytest.raises(InvalidRequest, match="ebnf must be Unicode text, got half of a surrogate"):
        engine.generate("A", {"ebnf": 'root ::= "\ud800"'})
