"""`/generate` as SGLang clients use it: shapes, batch rules, streams, error texts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from serving import Reply, ServerProcess, serving

GREEDY = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
META = {
    "id",
    "finish_reason",
    "prompt_tokens",
    "weight_version",
    "num_retractions",
    "completion_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "e2e_latency",
}


def test_single_text(server: ServerProcess):
    out = server.generate(text="the quick", sampling_params=GREEDY, rid="mine").json
    assert set(out) == {"text", "output_ids", "meta_info"}
    meta = out["meta_info"]
    assert set(meta) == META
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert meta["completion_tokens"] == len(out["output_ids"]) == 8
    text = server.post("/detokenize", {"tokens": out["output_ids"]}).json["text"]
    assert out["text"] == text


def test_put_and_ids_equal_text(server: ServerProcess):
    ids = server.post("/tokenize", {"prompt": "the quick"}).json["tokens"]
    by_text = server.generate(text="the quick", sampling_params=GREEDY).json
    by_ids = server.request("PUT", "/generate", {"input_ids": ids, "sampling_params": GREEDY}).json
    assert by_ids["output_ids"] == by_text["output_ids"]
    assert by_ids["meta_info"]["prompt_tokens"] == len(ids)


def test_batch_keeps_order_and_rids(server: ServerProcess):
    texts = ["the quick", "brown", "fox"]
    batch = server.generate(text=texts, sampling_params=GREEDY, rid="b").json
    alone = [server.generate(text=t, sampling_params=GREEDY).json for t in texts]
    assert [b["output_ids"] for b in batch] == [a["output_ids"] for a in alone]
    assert [b["meta_info"]["id"] for b in batch] == ["b_0", "b_1", "b_2"]


def test_batch_of_different_sampling(server: ServerProcess):
    params = [GREEDY, {**GREEDY, "max_new_tokens": 3}]
    out = server.generate(input_ids=[[5, 6], [5, 6]], sampling_params=params).json
    assert [len(o["output_ids"]) for o in out] == [8, 3]
    assert out[0]["output_ids"][:3] == out[1]["output_ids"]


def test_n_is_flat_prompt_major_and_samples_differ(server: ServerProcess):
    params = {"max_new_tokens": 8, "n": 2, "sampling_seed": 7, "ignore_eos": True}
    out = server.generate(text=["the", "fox"], sampling_params=params, rid="r").json
    assert [o["meta_info"]["id"] for o in out] == ["r_0_0", "r_0_1", "r_1_0", "r_1_1"]
    assert out[0]["output_ids"] != out[1]["output_ids"]
    again = server.generate(text=["the", "fox"], sampling_params=params).json
    assert [o["output_ids"] for o in out] == [o["output_ids"] for o in again]


def test_single_n_is_a_list(server: ServerProcess):
    out = server.generate(text="the", sampling_params={"max_new_tokens": 2, "n": 3}).json
    assert len(out) == 3


def test_stop_token_is_reported_and_trimmed(server: ServerProcess):
    ids = server.generate(text="the", sampling_params=GREEDY).json["output_ids"]
    at = ids.index(ids[3])
    params = GREEDY | {"stop_token_ids": [ids[3]]}
    out = server.generate(text="the", sampling_params=params).json
    assert out["output_ids"] == ids[: at + 1]
    assert out["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[3]}
    assert out["text"] == server.post("/detokenize", {"tokens": ids[:at]}).json["text"]
    kept = server.generate(text="the", sampling_params=params | {"no_stop_trim": True}).json
    assert kept["text"] == server.post("/detokenize", {"tokens": ids[: at + 1]}).json["text"]


@pytest.mark.parametrize("keep", [False, True])
def test_stop_string_across_tokens(server: ServerProcess, keep: bool):
    params = GREEDY | {"max_new_tokens": 60}
    full = server.generate(text="the", sampling_params=params).json["text"]
    stop = next(full[i : i + 3] for i in range(8, len(full) - 3) if "\ufffd" not in full[i : i + 3])
    end = full.index(stop)
    params |= {"stop": ["never", stop], "no_stop_trim": keep}
    out = server.generate(text="the", sampling_params=params).json
    assert out["text"] == full[: end + 3 * keep]
    assert out["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert out["meta_info"]["completion_tokens"] == len(out["output_ids"]) < 60
    events = server.generate(text="the", sampling_params=params, stream=True).events
    assert events[-1]["text"] == out["text"]
    assert all(out["text"].startswith(e["text"]) for e in events)


def test_stream_is_cumulative_and_equals_the_whole(server: ServerProcess):
    params = GREEDY | {"max_new_tokens": 40}
    whole = server.generate(text="the", sampling_params=params).json
    reply = server.generate(text="the", sampling_params=params, stream=True)
    assert reply.headers["Content-Type"] == "text/event-stream"
    events = reply.events
    for event in events:
        assert whole["text"].startswith(event["text"])
        count = event["meta_info"]["completion_tokens"]
        assert event["output_ids"] == whole["output_ids"][:count]
        assert set(event["meta_info"]) == META - {"e2e_latency"} | (
            {"e2e_latency"} if event is events[-1] else set()
        )
    assert [e["meta_info"]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["text"] == whole["text"] and events[-1]["output_ids"] == whole["output_ids"]


def test_batch_stream_carries_the_index(server: ServerProcess):
    texts = ["the", "fox"]
    whole = server.generate(text=texts, sampling_params=GREEDY).json
    events = server.generate(text=texts, sampling_params=GREEDY, stream=True).events
    for index in (0, 1):
        last = [e for e in events if e["index"] == index][-1]
        assert last["output_ids"] == whole[index]["output_ids"]


def test_stream_interval_thins_messages(server: ServerProcess):
    params = GREEDY | {"max_new_tokens": 40, "stream_interval": 10}
    events = server.generate(text="the", sampling_params=params, stream=True).events
    counts = [e["meta_info"]["completion_tokens"] for e in events]
    assert counts[0] >= 1 and counts[-1] == 40
    assert all(b - a >= 10 for a, b in pairwise(counts[:-1]))


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: ServerProcess, stream: bool):
    ids = server.post("/tokenize", {"prompt": "the quick"}).json["tokens"]
    reply = server.generate(
        text="the quick",
        sampling_params=GREEDY,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
        stream=stream,
    )
    out = reply.events[-1] if stream else reply.json
    meta = out["meta_info"]
    assert [t[1] for t in meta["input_token_logprobs"]] == ids
    assert meta["input_token_logprobs"][0][0] is None
    assert all(t[0] < 0 for t in meta["input_token_logprobs"][1:])
    assert [t[1] for t in meta["output_token_logprobs"]] == out["output_ids"]
    assert meta["output_token_logprobs_length"] == len(out["output_ids"])
    assert all(isinstance(t[2], str) for t in meta["output_token_logprobs"])
    assert all(len(top) == 2 for top in meta["output_top_logprobs"])
    assert meta["input_top_logprobs"][0] is None
    assert len(meta["input_top_logprobs"]) == len(ids)


def test_outputs_only_by_default_start(server: ServerProcess):
    meta = server.generate(text="the", sampling_params=GREEDY, return_logprob=True).json[
        "meta_info"
    ]
    assert meta["input_token_logprobs"] == []
    assert len(meta["output_token_logprobs"]) == 8
    assert meta["output_token_logprobs"][0][2] is None


def test_prompt_token_ids_on_request(server: ServerProcess):
    out = server.generate(
        input_ids=[4, 5], sampling_params=GREEDY, return_prompt_token_ids=True
    ).json
    assert out["prompt_token_ids"] == [4, 5]


def test_max_new_tokens_null_means_the_context(server: ServerProcess):
    params = {"max_new_tokens": None, "ignore_eos": True}
    out = server.generate(input_ids=[4] * 1000, sampling_params=params).json
    assert out["meta_info"]["completion_tokens"] == 24


def text_of(reply: Reply) -> str:
    assert reply.status == 400, reply.body
    body = reply.json
    assert body["object"] == "error" and body["code"] == body["error"]["code"] == 400
    assert body["message"] == body["error"]["message"]
    return body["message"]


TOO_LONG = "The input (1024 tokens) is longer than the model's context length (1024 tokens)."
TOO_MANY = (
    "Requested token count exceeds the model's maximum context length of 1024 tokens. You requested"
    " a total of 1128 tokens: 1000 tokens from the input messages and 128 tokens for the"
    " completion. Please reduce the number of tokens in the input text or the completion to fit"
    " within the limit."
)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Either text, input_ids or input_embeds should be provided."),
        (
            {"text": "a", "input_ids": [1]},
            "Either text, input_ids or input_embeds should be provided.",
        ),
        ({"input_ids": []}, "input_ids cannot be empty."),
        ({"input_ids": [[1], []]}, "input_ids cannot be empty."),
        ({"text": []}, "text cannot be empty."),
        ({"text": ""}, "input_ids cannot be empty."),
        ({"input_ids": [1, [2]]}, "input_ids mixes texts, ids and lists of ids."),
        ({"input_ids": [384]}, "input_ids must be in [0, 383], got 384."),
        ({"input_ids": [-1]}, "input_ids must be in [0, 383], got -1."),
        ({"input_ids": [2**70]}, "input_ids must be in [0, 383], got 1180591620717411303424."),
        ({"input_ids": [1] * 1024}, TOO_LONG),
        ({"input_ids": [1] * 1000}, TOO_MANY),
        (
            {"text": ["a", "b"], "rid": ["x", "x"]},
            "Duplicate request IDs detected within the request: x",
        ),
        (
            {"text": ["a", "b"], "rid": ["x"]},
            "rid has 1 entries for 2 prompts; give one per prompt or a single value.",
        ),
        (
            {"text": ["a", "b"], "sampling_params": [{}]},
            "sampling_params has 1 entries for 2 prompts; give one per prompt or a single value.",
        ),
        (
            {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
            "n must be the same for all prompts of a batch.",
        ),
        (
            {"text": ["a"], "return_logprob": [True], "sampling_params": {"n": 2}},
            "return_logprob cannot be a list when n > 1.",
        ),
        (
            {"text": "a", "top_logprobs_num": 21, "return_logprob": True},
            "top_logprobs_num must be in [0, 20], got 21.",
        ),
        (
            {"input_ids": [1], "logprob_start_len": 1, "return_logprob": True},
            "logprob_start_len must be -1 or in [0, 0], got 1.",
        ),
        ({"text": "a", "foo": 1}, "Unknown parameter: foo."),
        ({"text": 3}, "text must be str | array | null, got int."),
        ({"text": "a", "stream": "yes"}, "stream must be bool | null, got str."),
        ({"text": "a", "sampling_params": {"foo": 1}}, "Unknown parameter: sampling_params.foo."),
        (
            {"text": "a", "sampling_params": {"max_tokens": 1}},
            "Unknown parameter: sampling_params.max_tokens; did you mean max_new_tokens?",
        ),
        (
            {"text": "a", "lora_path": "x"},
            "lora_path is not supported by this server; leave it out.",
        ),
        (
            {"text": "a", "image_data": ["x"]},
            "image_data is not supported by this server; leave it out.",
        ),
        (
            {"text": "a", "sampling_params": {"stop_regex": "a*"}},
            "sampling_params.stop_regex is not supported by this server; leave it out.",
        ),
    ],
)
def test_refusals(server: ServerProcess, body: dict, message: str):
    assert text_of(server.post("/generate", body)) == message


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1."),
        ({"min_new_tokens": -1}, "min_new_tokens must be in [0, max_new_tokens], got -1."),
        (
            {"min_new_tokens": 9, "max_new_tokens": 8},
            "min_new_tokens must be in [0, max_new_tokens(8)], got 9.",
        ),
        ({"temperature": -0.5}, "temperature must be a non-negative finite number, got -0.5."),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0.0."),
        ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5."),
        ({"top_k": 0}, "top_k must be -1 (disable) or at least 1, got 0."),
        ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1."),
        ({"frequency_penalty": 3}, "frequency_penalty must be in [-2, 2], got 3.0."),
        ({"presence_penalty": -3}, "presence_penalty must be in [-2, 2], got -3.0."),
        (
            {"repetition_penalty": 0},
            "repetition_penalty must be in (0, 2] (1.0 = no penalty), got 0.0.",
        ),
        ({"n": 0}, "n must be in [1, 128], got 0."),
        ({"n": 10**30}, "n must be in [1, 128], got 1" + "0" * 30 + "."),
        ({"stop": ["x"] * 33}, "at most 32 stop strings are allowed, got 33"),
        ({"logit_bias": {"384": 1}}, "logit_bias must has keys in [0, 383], got 384."),
        ({"logit_bias": {"\uff11": 1}}, "logit_bias must has keys in [0, 383], got \\uff11."),
        (
            {"sampling_seed": 2**63},
            f"sampling_seed must be in [-2**63, 2**63 - 1], got {2**63}.",
        ),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be in [0, 383], got -1."),
        ({"temperature": 10**400}, "sampling_params.temperature is out of range."),
        ({"temperature": True}, "sampling_params.temperature must be float | null, got bool."),
    ],
)
def test_sampling_refusals(server: ServerProcess, params: dict, message: str):
    assert text_of(server.generate(text="a", sampling_params=params)) == message


def test_neutral_values_of_unsupported_fields_are_accepted(server: ServerProcess):
    neutral = {
        "lora_path": None,
        "image_data": None,
        "return_hidden_states": False,
        "log_metrics": True,
    }
    params = GREEDY | {"regex": None, "json_schema": "", "beam_width": 1, "stop": None}
    assert server.generate(text="a", sampling_params=params, **neutral).status == 200


def test_any_finite_temperature_is_taken(server: ServerProcess):
    params = {"max_new_tokens": 4, "temperature": 1e300, "sampling_seed": 1}
    assert server.generate(text="a", sampling_params=params).status == 200


def test_a_request_cannot_ask_not_to_be_counted(server: ServerProcess):
    reply = server.generate(text="a", sampling_params=GREEDY, log_metrics=False)
    assert reply.status == 400 and "log_metrics" in text_of(reply)


def test_64_streams_at_once_equal_the_serial_run(toy_artifact):
    """More than fit into the batch at once, some sampled, against one at a time."""
    bodies = [
        {
            "input_ids": [3 + i, 4, 5],
            "sampling_params": {
                "max_new_tokens": 20 + i % 7,
                "temperature": i % 2,
                "sampling_seed": i,
                "ignore_eos": True,
            },
        }
        for i in range(64)
    ]
    with serving(toy_artifact, "max_running=40") as server:
        serial = [server.post("/generate", body).json["output_ids"] for body in bodies]
        server.post("/flush_cache")
        with ThreadPoolExecutor(64) as pool:
            replies = pool.map(
                lambda body: server.post("/generate", body | {"stream": True}), bodies
            )
        assert [reply.events[-1]["output_ids"] for reply in replies] == serial


def test_salt_separates_prefix_caches(server: ServerProcess):
    ids = list(range(10, 100))

    def cached(**extra: str) -> int:
        body = {"input_ids": ids, "sampling_params": GREEDY} | extra
        return server.post("/generate", body).json["meta_info"]["cached_tokens"]

    cached(cache_salt="one")
    assert cached(cache_salt="one") > 0
    assert cached(cache_salt="two") == 0
