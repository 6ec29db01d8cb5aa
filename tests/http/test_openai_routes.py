"""OpenAI routes, driven by OpenAI's own client."""

from __future__ import annotations

import openai
import pytest
from serving import ServerProcess, serving

GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server: ServerProcess):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def native(server: ServerProcess, **params):
    body = {"temperature": 0, "ignore_eos": True} | params
    return server.generate(text="the quick", sampling_params=body).json


def test_models(client: openai.OpenAI):
    (model,) = client.models.list()
    assert model.id == "toy" and model.max_model_len == 1024
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_completion_equals_native(server: ServerProcess, client: openai.OpenAI):
    out = client.completions.create(model="toy", prompt="the quick", **GREEDY)
    want = native(server, max_new_tokens=16)
    (choice,) = out.choices
    assert choice.text == want["text"] and choice.finish_reason == "length"
    assert out.usage is not None
    assert out.usage.completion_tokens == 16
    assert out.usage.total_tokens == out.usage.prompt_tokens + 16
    assert out.object == "text_completion" and out.id.startswith("cmpl-")


def test_completion_stream_adds_up(server: ServerProcess, client: openai.OpenAI):
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            model="toy", prompt="the quick", stream=True, stream_options=options, **GREEDY
        )
    )
    assert (
        "".join(c.choices[0].text for c in chunks[:-1]) == native(server, max_new_tokens=16)["text"]
    )
    assert [c.choices[0].finish_reason for c in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 16


def test_completion_batch_n_echo_logprobs(client: openai.OpenAI):
    out = client.completions.create(
        model="toy", prompt=["the", "fox"], n=2, echo=True, logprobs=2, max_tokens=4, seed=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [c.index for c in out.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(out.choices, ["the", "the", "fox", "fox"], strict=True):
        assert choice.text.startswith(prompt)
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None
        assert all(p < 0 for p in logprobs.token_logprobs[1:])
        assert "".join(logprobs.tokens).startswith(prompt)
        sizes = [len(token) for token in logprobs.tokens]
        assert logprobs.text_offset == [sum(sizes[:i]) for i in range(len(sizes))]
        # Two ids may share a spelling, and then an entry.
        assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs[1:])
    assert out.usage.prompt_tokens < 8 and out.usage.completion_tokens == 16


def test_offsets_of_a_stream_are_those_of_the_whole(client: openai.OpenAI):
    asked = dict(model="toy", prompt="the", echo=True, logprobs=1, max_tokens=5, **GREEDY)
    whole = client.completions.create(**asked).choices[0]
    chunks = [c.choices[0] for c in client.completions.create(**asked, stream=True)]
    assert "".join(c.text for c in chunks) == whole.text
    for name in ("tokens", "text_offset", "token_logprobs"):
        told = [x for c in chunks if c.logprobs for x in getattr(c.logprobs, name)]
        assert told == getattr(whole.logprobs, name)


def test_bytes_of_tokens_put_half_characters_together(server: ServerProcess):
    """A token may be part of a character: what stands for it as text is lost."""
    ids = server.post("/v1/tokenize", {"prompt": "\u65e5\U0001f600"}).json["tokens"]
    body = {
        "messages": HELLO,
        "max_tokens": 40,
        "logprobs": True,
        "logit_bias": {str(i): 50 for i in ids},
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    choice = server.post("/v1/chat/completions", body).json["choices"][0]
    entries = choice["logprobs"]["content"]
    assert any(bytes(entry["bytes"]).decode(errors="replace") == "\ufffd" for entry in entries)
    said = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
    assert said == choice["message"]["content"]


def test_completion_of_ids(server: ServerProcess, client: openai.OpenAI):
    ids = server.post("/v1/tokenize", {"prompt": "the quick"}).json["tokens"]
    out = client.completions.create(model="toy", prompt=[ids], max_tokens=5, **GREEDY)
    assert out.choices[0].text == native(server, max_new_tokens=5)["text"]


def test_stop_and_matched_stop(server: ServerProcess, client: openai.OpenAI):
    full = native(server, max_new_tokens=60)["text"]
    stop = next(full[i : i + 3] for i in range(5, len(full) - 3) if "\ufffd" not in full[i : i + 3])
    out = client.completions.create(
        model="toy", prompt="the quick", max_tokens=60, stop=[stop], **GREEDY
    )
    (choice,) = out.choices
    assert choice.text == full[: full.index(stop)]
    assert choice.finish_reason == "stop" and choice.matched_stop == stop


def test_chat_uses_the_template(server: ServerProcess, client: openai.OpenAI):
    out = client.chat.completions.create(model="toy", messages=HELLO, max_tokens=12, **GREEDY)
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    want = server.generate(text=prompt, sampling_params=params).json
    assert out.choices[0].message.content == want["text"]
    assert out.choices[0].message.role == "assistant"
    assert out.usage.prompt_tokens == want["meta_info"]["prompt_tokens"]


def test_chat_stream_adds_up(client: openai.OpenAI):
    want = client.chat.completions.create(model="toy", messages=HELLO, max_tokens=12, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            model="toy", messages=HELLO, max_completion_tokens=12, stream=True, **GREEDY
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == want.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_cover_every_token(client: openai.OpenAI, stream: bool):
    out = client.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=12, logprobs=True, top_logprobs=3,
        stream=stream, **GREEDY,
    )  # fmt: skip
    choices = [c.choices[0] for c in out] if stream else out.choices
    content = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    assert len(content) == 12
    assert all(len(entry.top_logprobs) == 3 and entry.logprob < 0 for entry in content)
    assert all(bytes(e.bytes).decode(errors="replace") == e.token for e in content)


def test_chat_n(client: openai.OpenAI):
    out = client.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=8, n=3, seed=1, extra_body={"ignore_eos": True}
    )
    assert [c.index for c in out.choices] == [0, 1, 2]
    assert len({c.message.content for c in out.choices}) > 1
    assert out.usage.completion_tokens == 24


def test_seed_repeats_and_common_fields_are_accepted(client: openai.OpenAI):
    def once() -> str:
        out = client.chat.completions.create(
            model="toy", messages=HELLO, max_tokens=10, seed=11, user="me", store=False,
            metadata={"a": "b"}, logit_bias={"300": 2}, frequency_penalty=0.5,
            extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1},
        )  # fmt: skip
        return out.choices[0].message.content

    assert once() == once()


def test_continue_final_message(server: ServerProcess):
    messages = [*HELLO, {"role": "assistant", "content": "the quick"}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 1}
    ids = server.post("/tokenize", body).json["tokens"]
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe quick"
    assert ids == server.post("/tokenize", {"prompt": prompt}).json["tokens"]


def test_control_tokens_in_messages_stay_text(server: ServerProcess):
    body = {"messages": [{"role": "user", "content": "a<|im_end|>b"}]}
    ids = server.post("/tokenize", body).json["tokens"]
    assert ids.count(2) == 1  # the template's own
    text = server.post("/detokenize", {"tokens": ids, "skip_special_tokens": False}).json["text"]
    assert "a<|im_end|>b" in text


def test_text_parts_are_joined(server: ServerProcess):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    split = server.post("/tokenize", {"messages": [{"role": "user", "content": parts}]}).json
    whole = server.post("/tokenize", {"messages": [{"role": "user", "content": "a b"}]}).json
    assert split == whole


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {}, "Missing parameter: prompt."),
        ("completions", {"prompt": []}, "prompt cannot be empty."),
        ("completions", {"prompt": "a", "wat": 1}, "Unknown parameter: wat."),
        (
            "completions",
            {"prompt": "a", "best_of": 2},
            "best_of is not supported by this server; leave it out.",
        ),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs must be in [0, 20], got 21."),
        ("completions", {"prompt": "a", "n": 129}, "n must be in [1, 128], got 129."),
        (
            "completions",
            {"prompt": ["a"] * 100, "n": 100},
            "prompts x n must be at most 1024, got 10000.",
        ),
        ("chat/completions", {"messages": []}, "messages must hold 1 to 4096 messages, got 0."),
        (
            "chat/completions",
            {"messages": [{"content": "x"}]},
            "Missing parameter: messages[0].role.",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content may only hold text parts; this model takes no media.",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "response_format": {"type": "json_schema"}},
            "Missing parameter: response_format.json_schema.",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "chat_template_kwargs": {"messages": []}},
            "Unknown parameter: chat_template_kwargs.messages.",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "top_logprobs": 2},
            "top_logprobs needs logprobs to be true.",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "chat_template": "{{ 1 }}"},
            "Unknown parameter: chat_template.",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]},
            "This model's chat template has no place for tools; leave tools out.",
        ),
    ],
)
def test_refusals(server: ServerProcess, path: str, body: dict, message: str):
    reply = server.post(f"/v1/{path}", body)
    assert (reply.status, reply.message) == (400, message)


def test_ids_out_of_range_are_named_as_they_were_given(server: ServerProcess):
    reply = server.post("/detokenize", {"tokens": [1, 384]})
    assert (reply.status, reply.message) == (400, "tokens must be in [0, 383], got 384.")


def test_unknown_model_is_404(server: ServerProcess):
    reply = server.post("/v1/completions", {"prompt": "a", "model": "gpt-4"})
    assert reply.status == 404 and reply.json["error"]["param"] == "model"


def test_template_that_does_not_compile_spoils_only_chat(tmp_path):
    from toy_artifact import write_artifact

    with serving(write_artifact(tmp_path, template="{% if %}")) as server:
        for _ in range(2):
            reply = server.post("/v1/chat/completions", {"messages": HELLO})
            assert reply.status == 400
            assert reply.message == "this model's chat template cannot be compiled."
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status == 200


def test_chat_without_max_tokens_fits_a_small_kv_pool(toy_artifact):
    with serving(toy_artifact, "kv_tokens=256") as server:
        body = {"messages": HELLO, "ignore_eos": True}
        usage = server.post("/v1/chat/completions", body).json["usage"]
        assert 200 < usage["total_tokens"] <= 256


def test_template_that_hangs_hurts_only_its_request(tmp_path):
    from toy_artifact import TEMPLATE, write_artifact

    loop = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    bomb = "{% if messages[0].content == 'bomb' %}" + loop + "{% endif %}"
    with serving(write_artifact(tmp_path, template=bomb + TEMPLATE)) as server:
        reply = server.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "bomb"}]}
        )
        assert reply.status == 400
        assert reply.message == "the chat template did not finish within 2 s."
        reply = server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})
        assert reply.status == 200
