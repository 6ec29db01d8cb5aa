"""Chat templates as they are frozen: every named one renders as transformers renders it and as the
family publishes its format; what cannot be parsed or rendered is refused with its line.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import sentencepiece
import tokenizers

from compiler.chat_template import check_template, templates
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.text import read_text
from runtime.text.chat import ChatTemplate, TemplateRefused
from runtime.text.tokenizer import Guard, Tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Be <brief> & 'kind'."}
TURNS = [
    {"role": "user", "content": "  Hallo Köln 🎉 "},
    {"role": "assistant", "content": "Ja.\n"},
    {"role": "user", "content": "{{ 7*7 }}\n"},
]
FUNCTION = {
    "name": "weather",
    "description": "<ä> & 'b'",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOL_TURNS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "name": "weather", "content": '{"t": 3}'},
    {"role": "tool", "name": "weather", "content": '{"t": 4}'},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "Thanks"},
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": TURNS[:1],
    "turns": TURNS,
    "system": [SYSTEM, *TURNS],
    "answered": TURNS[:2],
    "tools": TOOL_TURNS,
    "system tools": [SYSTEM, *TOOL_TURNS],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "generate": {"add_generation_prompt": True},
    "plain": {"add_generation_prompt": False},
    "with tools": {"add_generation_prompt": True, "tools": TOOLS},
    "continue": {"continue_final_message": True, "add_generation_prompt": False},
}

# What checkpoints ship today, for features the named templates do not use: blocks for training,
# dates, namespaces, macros, loop controls, reasoning.
SHIPPED = {
    "generation and dates": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

Today Date: {{ date_string }}
{% for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- set said = message.content %}
            {{- said | trim + '<|eot_id|>' }}
        {%- endgeneration %}
        {{- said is defined }}
    {%- else %}
        {{- message.role ~ ': ' ~ message.content }}
    {%- endif %}
{%- endfor %}
{%- if tools is not none and tools %}{{ tools | tojson(indent=4) }}{% endif %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant\\n\\n' }}{% endif %}
""",
    "namespace and reasoning": """{%- macro turn(role, text) %}
[{{ role }}]{{ text }}
{%- endmacro %}
{%- set ns = namespace(last=-1, calls=0) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last == -1 %}
        {%- set ns.last = (messages | length) - loop.index %}{% break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.reasoning_content is string %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {{- turn(message.role | upper, message.content) }}
    {%- for call in message.tool_calls or [] %}
        {%- set ns.calls = ns.calls + 1 %}
        {{- call.function.name ~ call.function.arguments | tojson ~ ns.calls }}
    {%- endfor %}
{%- endfor %}
{{- ns.last }}{% if add_generation_prompt %}>{% endif %}
""",
}
SOURCES = {name: path.read_text() for name, path in templates().items()} | SHIPPED


@pytest.fixture(scope="module")
def reference() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), **NAMES
    )


def renders(render: Any) -> str | None:
    """The prompt, or None when the template refuses the conversation."""
    try:
        return str(render())
    except (TemplateRefused, jinja2.TemplateError, TypeError, ValueError, LookupError):
        return None


@pytest.mark.parametrize("name", SOURCES)
def test_equals_transformers(name: str, reference: Any) -> None:
    ours = ChatTemplate(SOURCES[name], NAMES)
    rendered = 0
    for messages in CONVERSATIONS.values():
        for options in OPTIONS.values():
            if options.get("continue_final_message") and messages[-1]["role"] != "assistant":
                continue
            want = renders(
                lambda m=messages, o=options: reference.apply_chat_template(
                    m, chat_template=SOURCES[name], tokenize=False, **o
                )
            )
            got = renders(lambda m=messages, o=options: ours.render(m, **o))
            assert got == want
            rendered += got is not None
    assert rendered >= 6


def test_reasoning_comes_under_any_name(reference: Any) -> None:
    source = SHIPPED["namespace and reasoning"]
    for name in ("reasoning", "thinking", "reasoning_content"):
        messages = [TURNS[0], {"role": "assistant", "content": "b", name: "because"}]
        want = reference.apply_chat_template(messages, chat_template=source, tokenize=False)
        got = ChatTemplate(source, {}).render(messages, add_generation_prompt=False)
        assert got == want and "<think>because</think>" in got


@pytest.mark.parametrize("said", ["a", "a  ", "user", "</s>", "CONTINUE_FINAL_MESSAGE_TAG x"])
@pytest.mark.parametrize("name", SOURCES)
def test_continuing_cuts_where_the_message_ends(name: str, said: str, reference: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    want = reference.apply_chat_template(
        messages, chat_template=SOURCES[name], tokenize=False, continue_final_message=True
    )
    assert ChatTemplate(SOURCES[name], NAMES).render(messages, continue_final_message=True) == want


# --- formats as published -------------------------------------------------------------------------

S, U, A, V = (
    {"role": role, "content": text}
    for role, text in (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"))
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
# [U, A, V] with a generation prompt, and [S, U] with one (None: there is no system role).
PUBLISHED: dict[str, tuple[str, str | None]] = {
    "chatml": (
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    ),
    "internlm2": (
        "<s><|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "llama2": (
        "<s>[INST] U [/INST] A </s><s>[INST] V [/INST]",
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s>[INST] U [/INST]A</s>[INST] V [/INST]", None),
    "gemma": (
        "<s><start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n",
        None,
    ),
    "vicuna": (
        f"{VICUNA}USER: U ASSISTANT: A</s>USER: V ASSISTANT:",
        "S USER: U ASSISTANT:",
    ),
    "chatglm2": (
        "[gMASK]sop[Round 1]\n\n问\uff1aU\n\n答\uff1aA\n\n[Round 2]\n\n问\uff1aV\n\n答\uff1a",
        None,
    ),
    "chatglm3": (
        "[gMASK]sop<|user|>\n U<|assistant|>\n A<|user|>\n V<|assistant|>",
        "[gMASK]sop<|system|>\n S<|user|>\n U<|assistant|>",
    ),
    "baichuan2": (
        "<reserved_106>U<reserved_107>A<reserved_106>V<reserved_107>",
        "S<reserved_106>U<reserved_107>",
    ),
    "deepseek-llm": (
        "<s>User: U\n\nAssistant: A</s>User: V\n\nAssistant:",
        "<s>S\n\nUser: U\n\nAssistant:",
    ),
    "minicpm": ("<用户>U<AI>A<用户>V<AI>", "S<用户>U<AI>"),
    "phi3": (
        "<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nV<|end|>\n<|assistant|>\n",
        "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\n",
    ),
}


@pytest.mark.parametrize("name", templates())
def test_named_templates_write_the_published_format(name: str) -> None:
    template = ChatTemplate(SOURCES[name], NAMES)
    turns, with_system = PUBLISHED[name]
    assert template.render([U, A, V]) == turns
    if with_system is None:
        with pytest.raises(TemplateRefused):
            template.render([S, U])
    else:
        assert template.render([S, U]) == with_system


def test_chatglm3_tokens_are_those_its_code_builds(tmp_path: Path) -> None:
    """build_single_message: the role's token, the encoding of a newline, that of the text."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello you there", "how are you"] * 20),
        model_writer=out,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
    )
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    text = read_text(tmp_path, {}, 1000, "chatglm3")
    ours = Tokenizer.load(text.files.get)
    assert ours is not None
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    n = model.get_piece_size()
    want = [n + 1, n + 3]
    for role, said in ((5, "you there"), (6, "hello"), (7, "how are you")):
        want += [n + role, *model.encode("\n"), *model.encode(said)]
    want += [n + 7]
    messages = [
        {"role": "system", "content": "you there"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "how are you"},
    ]
    prompt = ChatTemplate(text.files["chat_template.jinja"].decode(), {}).render(messages)
    assert ours.encode_chat(prompt, Guard(mark="", hit=False)) == want


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a\n{% for %}", "line 2"),
        ("a\n\n{{ messages | nothing }}", "line 3.*nothing"),
        ("a\n{{ messages[0].content }}\n{{ foo.bar.baz }}", "line 3.*'foo' is undefined"),
        ("{% if true %}\n{{ raise_exception('never') }}{% endif %}", "line 2.*never"),
        ("{{ unheard_of() }}", "line 1.*unheard_of"),
    ],
)
def test_what_never_renders_is_refused_with_its_line(source: str, said: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=f"chat template of here: {said}") as caught:
        check_template(source, "here", NAMES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for d in documents %}{{ d.title }}{% endfor %}",
        "{% if not tools %}{{ raise_exception('tools!') }}{% endif %}",
        "{{ messages[0].content }}",
    ],
)
def test_templates_for_tools_or_documents_only_are_taken(source: str) -> None:
    check_template(source, "here", NAMES)


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CompileError, match=re.escape(", ".join(templates()))):
        read_text(tmp_path, {}, 10, "chatlm")
    own = [{"name": "rag", "template": "R{{ messages[0].content }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": own}))
    frozen = read_text(tmp_path, {}, 10, "rag").files["chat_template.jinja"]
    assert frozen.startswith(b"R")
    assert read_text(tmp_path, {}, 10, "chatml").files["chat_template.jinja"] == (
        templates()["chatml"].read_bytes()
    )
