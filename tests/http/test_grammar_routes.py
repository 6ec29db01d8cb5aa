"""Grammar fields on the native and the OpenAI routes."""

from __future__ import annotations

import json
import re

import openai
import pytest
from serving import ServerProcess

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer"}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
EXCLUSIVE = "Only one of json_schema, regex, ebnf, or structural_tag can be set."


def native(server: ServerProcess, **params):
    body = {"max_new_tokens": 200, "sampling_seed": 3} | params
    return server.generate(text="the quick", sampling_params=body)


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        ({"regex": "[a-f]{4}-[0-9]+x"}, "[a-f]{4}-[0-9]+x"),
        ({"ebnf": 'root ::= ("ab" | "cd") [0-9]'}, "(ab|cd)[0-9]"),
        ({"json_schema": '{"enum": ["red", "blue"]}'}, '"(red|blue)"'),
    ],
)
def test_native_fields(server: ServerProcess, params: dict, pattern: str):
    out = native(server, **params).json
    assert re.fullmatch(pattern, out["text"]), out
    assert out["meta_info"]["finish_reason"] == {"type": "stop", "matched": None}


def test_structural_tag_leaves_the_rest_of_a_text_free(server: ServerProcess):
    tag = {
        "structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}],
        "triggers": ["<f"],
    }
    opening = server.post("/tokenize", {"prompt": "<f"}).json["tokens"]
    bias = {str(i): 90 for i in opening}
    params = {"structural_tag": json.dumps(tag), "logit_bias": bias, "max_new_tokens": 40}
    out = native(server, **params).json
    assert all(re.match(r">-?[0-9]*", rest) for rest in out["text"].split("<f")[1:])


def test_openai_fields(server: ServerProcess):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
        for wanted in (schema, {"type": "json_object"}, {"type": "text"}):
            out = client.chat.completions.create(
                model="toy",
                messages=HELLO,
                response_format=wanted,
                max_tokens=900,
                seed=2,
                temperature=0.7,
            )
            choice = out.choices[0]
            if wanted["type"] == "text":
                continue
            assert choice.finish_reason == "stop"
            found = json.loads(choice.message.content)
            assert isinstance(found, dict) and (wanted is not schema or set(found) == {"ok", "n"})
        made = client.completions.create(
            model="toy", prompt="a", max_tokens=40, extra_body={"regex": "x{3}y"}, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in made) == "xxxy"


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("", {"sampling_params": {"regex": "a", "ebnf": "b"}}, EXCLUSIVE),
        ("", {"sampling_params": {"json_schema": {}}}, "sampling_params.json_schema must be str"),
        ("", {"sampling_params": {"regex": "["}}, "regex is refused: error: unclosed"),
        (
            "",
            {"sampling_params": {"json_schema": '{"type": "x"}'}},
            "json_schema is refused: Invalid",
        ),
        ("", {"sampling_params": {"json_schema": " " * 65537}}, "json_schema is 65537 bytes, over"),
        ("v1", {"regex": "a", "response_format": {"type": "json_object"}}, EXCLUSIVE),
        ("v1", {"response_format": {"type": "yaml"}}, "response_format.type is none of the values"),
        ("v1", {"response_format": {"type": "structural_tag"}}, "structural_tag is refused: expec"),
    ],
)
def test_refusals(server: ServerProcess, route: str, body: dict, message: str):
    if route:
        reply = server.post("/v1/chat/completions", {"messages": HELLO} | body)
    else:
        reply = server.post("/generate", {"text": "a"} | body)
    assert reply.status == 400
    assert message in reply.json["error"]["message"]


def test_a_refused_stream_keeps_its_status(server: ServerProcess):
    params = {"regex": "["}
    reply = server.post("/generate", {"text": "a", "stream": True, "sampling_params": params})
    assert reply.status == 400


def test_a_bomb_is_refused_and_the_server_lives(server: ServerProcess):
    bomb = "start: T\nT: " + " & ".join(f"/(.*a.{{{i}}}.*)/" for i in range(20, 60)) + "\n"
    reply = native(server, ebnf=bomb)
    assert reply.status == 400
    assert "does not compile within" in reply.json["error"]["message"]
    assert native(server, regex="ok").json["text"] == "ok"
    assert b"headstart:num_grammar_queue_reqs" in server.get("/metrics").body
