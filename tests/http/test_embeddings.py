"""Embedding models behind HTTP and in the offline engine: a toy BERT with its word pieces, compiled
and run by its kernels, against transformers; and what is refused where.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from serving import Reply, ServerProcess, serving

from compiler.pipeline import compile_model
from compiler.progress import Progress
from conf.load import load
from conf.schema import CompileConfig
from runtime.engine import Engine
from runtime.errors import InvalidRequest

transformers = pytest.importorskip("transformers")
WORDS = "the quick brown fox jump ##s ##ed over lazy dog un ##know ##n , . ! ? it ' s 漢 字 ko ##ln"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
TEXTS = [
    "The quick brown fox jumped over the lazy dog!",
    "unknown",
    "It's 漢字, Köln.",
    "the " * 40,
]


class Subject:
    """The model, its tokenizer, and its artifact."""

    def __init__(self, directory: Path) -> None:
        source = directory / "toy"
        config = transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=48,
            attn_implementation="eager",
        )
        torch.manual_seed(0)
        self.model = transformers.BertModel(config).eval()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(torch.randn_like(p) * 0.3 + name.endswith("LayerNorm.weight"))
        self.model.save_pretrained(source)
        (source / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        options = ["model.pooling=mean", "model.normalize=true", "model.dimensions=[8,16]"]
        shape = ["shape.max_tokens=64", "shape.max_seqs=8"]
        given = ["dtype=float32", "name=toy-bert", f"out={directory}", *options, *shape]
        loaded = load(CompileConfig, "compile", ["model=hf", f"model.source={source}", *given])
        self.artifact = compile_model(loaded.config, loaded.sources, Progress())

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def vector(self, ids: list[int], dimensions: int = 32) -> np.ndarray:
        with torch.inference_mode():
            states = self.model(torch.tensor([ids])).last_hidden_state[0].double()
        mean = (states.sum(0) / len(states))[:dimensions]
        return (mean / mean.pow(2).sum().sqrt()).numpy()


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("embedding"))


@pytest.fixture(scope="module")
def server(subject: Subject) -> Iterator[ServerProcess]:
    with serving(subject.artifact, "device=auto") as running:
        yield running


def embeddings(server: ServerProcess, **body: Any) -> Reply:
    return server.post("/v1/embeddings", body)


def close(got: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-4)


def test_word_pieces_are_those_of_transformers(subject: Subject, server: ServerProcess) -> None:
    for text in TEXTS:
        said = server.post("/tokenize", {"prompt": text}).json
        assert said["tokens"] == subject.ids(text)
    assert subject.ids("unknown") == [2, VOCAB.index("un"), *map(VOCAB.index, ("##know", "##n")), 3]


def test_openai_batch_of_texts(subject: Subject, server: ServerProcess) -> None:
    reply = embeddings(server, input=TEXTS, model="toy-bert", user="someone")
    assert reply.status == 200
    body = reply.json
    assert body["object"] == "list" and body["model"] == "toy-bert"
    assert [item["index"] for item in body["data"]] == [0, 1, 2, 3]
    total = sum(len(subject.ids(text)) for text in TEXTS)
    assert body["usage"] == {"prompt_tokens": total, "total_tokens": total}
    for item, text in zip(body["data"], TEXTS, strict=True):
        assert item["object"] == "embedding"
        close(item["embedding"], subject.vector(subject.ids(text)))


@pytest.mark.parametrize(
    "given",
    ["the dog", [2, 5, 3], ["the dog", "fox"], [[2, 5, 3], [2, 6, 7, 3]]],
    ids=["text", "ids", "texts", "lists of ids"],
)
def test_base64_holds_the_same_float32(subject: Subject, server: ServerProcess, given: Any) -> None:
    plain = embeddings(server, input=given, encoding_format="float").json["data"]
    packed = embeddings(server, input=given, encoding_format="base64").json["data"]
    single = isinstance(given, str) or isinstance(given[0], int)
    sources = [given] if single else given
    assert len(plain) == len(packed) == len(sources)
    for a, b, source in zip(plain, packed, sources, strict=True):
        numbers = np.frombuffer(base64.b64decode(b["embedding"]), "<f4")
        assert numbers.tolist() == a["embedding"]
        close(numbers, subject.vector(subject.ids(source) if isinstance(source, str) else source))


def test_the_openai_client(subject: Subject, server: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    found = client.embeddings.create(model="toy-bert", input=TEXTS[:2], dimensions=8)
    assert [len(item.embedding) for item in found.data] == [8, 8]
    close(found.data[0].embedding, subject.vector(subject.ids(TEXTS[0]), 8))


def test_dimensions(subject: Subject, server: ServerProcess) -> None:
    for wanted in (8, 16, 32):
        got = embeddings(server, input="the dog", dimensions=wanted).json["data"][0]["embedding"]
        close(got, subject.vector(subject.ids("the dog"), wanted))
    for wanted in (0, 9, 33, -1):
        reply = embeddings(server, input="the dog", dimensions=wanted)
        assert reply.status == 400 and reply.json["param"] == "dimensions"
        assert reply.message == (
            f"dimensions must be one of 8, 16, 32 for this model, got {wanted}."
        )


def test_encode_answers_as_sglang(subject: Subject, server: ServerProcess) -> None:
    one = server.post("/encode", {"text": TEXTS[0], "rid": "mine"}).json
    close(one["embedding"], subject.vector(subject.ids(TEXTS[0])))
    meta = one["meta_info"]
    assert meta["id"] == "mine" and meta["prompt_tokens"] == len(subject.ids(TEXTS[0]))
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert "completion_tokens" not in meta and meta["e2e_latency"] > 0
    many = server.post("/encode", {"input_ids": [[2, 5, 3], [2, 9, 3]], "dimensions": 16}).json
    assert [len(one["embedding"]) for one in many] == [16, 16]
    assert server.request("PUT", "/encode", {"text": ["fox"]}).json[0]["embedding"]


def test_a_long_batch_in_any_mixture(subject: Subject, server: ServerProcess) -> None:
    """More than a step holds, of every length; each alone gives the same bits."""
    batch = [[2, *[5 + (i * j) % 20 for j in range(i % 46)], 3] for i in range(100)]
    together = server.post("/encode", {"input_ids": batch}).json
    for i in (0, 1, 45, 46, 99):
        alone = server.post("/encode", {"input_ids": batch[i]}).json
        assert alone["embedding"] == together[i]["embedding"]
        close(alone["embedding"], subject.vector(batch[i]))


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/embeddings", {"input": []}, "input cannot be empty."),
        ("/v1/embeddings", {"input": ["a", [1]]}, "input mixes texts, ids and lists of ids."),
        ("/v1/embeddings", {}, "Missing parameter: input."),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "temperature": 1}, "Unknown parameter: temperature."),
        ("/v1/embeddings", {"input": [64]}, "input_ids must be in [0, 63], got 64."),
        (
            "/v1/embeddings",
            {"input": "the " * 47},
            "The input (49 tokens) is longer than the model's context length (48 tokens).",
        ),
        ("/encode", {}, "Either text or input_ids should be provided."),
        ("/encode", {"text": "a", "image_data": "x"}, "image_data is not supported"),
        ("/encode", {"input_ids": []}, "input_ids cannot be empty."),
    ],
)
def test_bad_input_is_named(server: ServerProcess, path: str, body: Any, said: str) -> None:
    reply = server.post(path, body)
    assert reply.status == 400 and said in reply.message


def test_model_names(server: ServerProcess) -> None:
    assert embeddings(server, input="a", model="other").status == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a"}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_an_embedding_model_does_not_generate(server: ServerProcess, path: str, body: Any) -> None:
    reply = server.post(path, body)
    assert reply.status == 400
    assert reply.message == (
        "This is an embedding model: it generates no text. Use /encode or /v1/embeddings."
    )


@pytest.mark.parametrize(
    ("path", "body"), [("/encode", {"text": "a"}), ("/v1/embeddings", {"input": "a"})]
)
def test_a_generator_does_not_embed(path: str, body: Any, tmp_path: Path) -> None:
    from toy_artifact import write_artifact

    with serving(write_artifact(tmp_path)) as generator:
        reply = generator.post(path, body)
    assert reply.status == 400
    assert reply.message.startswith("This model does not appear to be an embedding model")


def test_what_the_server_says_of_itself(server: ServerProcess) -> None:
    info = server.get("/model_info").json
    assert info["is_generation"] is False
    assert info["embedding"]["pooling"] == "mean" and info["embedding"]["dimensions"] == [8, 16]
    assert server.get("/health_generate").status == 200
    server.wait_idle()


def test_engine_encode(subject: Subject) -> None:
    with Engine(str(subject.artifact)) as engine:
        one = engine.encode(TEXTS[0])
        close(one["embedding"], subject.vector(subject.ids(TEXTS[0])))
        many = engine.encode(TEXTS, dimensions=16)
        assert [len(found["embedding"]) for found in many] == [16] * 4
        again = asyncio.run(engine.async_encode(input_ids=[subject.ids(TEXTS[0])]))
        assert again[0]["embedding"] == one["embedding"]
        with pytest.raises(InvalidRequest, match="generates no text"):
            engine.generate("a")
        with pytest.raises(InvalidRequest, match="longer than the model's context"):
            engine.encode("the " * 60)


def test_engine_of_a_generator_does_not_encode(tmp_path: Path) -> None:
    from toy_artifact import write_artifact

    with (
        Engine(str(write_artifact(tmp_path)), device="null") as engine,
        pytest.raises(InvalidRequest, match="does not appear to be an embedding model"),
    ):
        engine.encode("a")
