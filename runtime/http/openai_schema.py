"""OpenAI request bodies: their fields, what we ignore, what we refuse, and how they become
sampling.

Comes in: a parsed JSON object. Goes out: `CompletionBody` or `ChatBody`, and the `Sampling` both
share. Used by openai.py and chat.py.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from conf.schema import LimitsConfig
from runtime.errors import InvalidRequest
from runtime.request import GrammarKind
from runtime.text.grammar import EXCLUSIVE
from runtime.text.sampling import Sampling, SamplingBody, sampling_from
from runtime.text.schema import check_unsupported, convert

# Sent by common clients, cannot change an answer here.
IGNORED = frozenset(
    """
    user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention
    parallel_tool_calls separate_reasoning stream_reasoning verbosity conversation_id routing_key
    """.split()  # noqa: SIM905 - a list of quoted names is three times as long
)

# Known to OpenAI or SGLang, not to us: refused unless at a value that asks for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "stop_regex": ("", []),
    "lora_path": ("",),
    "session_params": ({},),
    "custom_params": ({},),
    "custom_logit_processor": ("",),
    "return_hidden_states": (),
    "return_routed_experts": (),
    "return_token_ids": (),
    "return_cached_tokens_details": (),
    "custom_labels": ({},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": ([], ["text"]),
    "audio": ({},),
    "prediction": ({},),
    "web_search_options": (),
    "logit_processors": ([],),
    "input_ids": (),
    "reasoning": ({},),
    "bootstrap_host": ("",),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "max_thinking_tokens": (),
    "beam_width": (1,),
    "use_beam_search": (),
}


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(msgspec.Struct, kw_only=True):
    """`schema` is what counts; name, description and strict are for the caller."""

    schema: dict[str, Any]


class ResponseFormat(msgspec.Struct, kw_only=True):
    """`structures` and `triggers`: of a structural_tag."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class CommonBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    rid: str | list[str] | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    response_format: ResponseFormat | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionBody(CommonBody, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Other keys (tool_calls, reasoning_content, …) reach the template through the raw message."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(CommonBody, kw_only=True, forbid_unknown_fields=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None


Body = TypeVar("Body", bound=CommonBody)


def read_body(body: Any, kind: type[Body]) -> Body:
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    known = {k: v for k, v in body.items() if k not in IGNORED}
    return convert(check_unsupported(known, UNSUPPORTED), kind)


def sampling(
    body: CommonBody,
    *,
    most: int | None,
    defaults: dict[str, Any],
    vocab: int,
    limits: LimitsConfig,
) -> Sampling:
    """`defaults`: the model's generation config, for what the body leaves out."""

    def pick(name: str) -> Any:
        value = getattr(body, name)
        return defaults.get(name) if value is None else value

    grammar = grammar_fields(body)
    return sampling_from(
        SamplingBody(
            max_new_tokens=most,
            min_new_tokens=body.min_tokens,
            temperature=pick("temperature"),
            top_p=pick("top_p"),
            top_k=pick("top_k"),
            min_p=pick("min_p"),
            repetition_penalty=pick("repetition_penalty"),
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
            n=body.n,
            stop=body.stop,
            stop_token_ids=body.stop_token_ids,
            no_stop_trim=body.no_stop_trim,
            ignore_eos=body.ignore_eos,
            skip_special_tokens=body.skip_special_tokens,
            logit_bias=body.logit_bias,
            sampling_seed=body.seed,
            json_schema=grammar.get("json_schema"),
            regex=grammar.get("regex"),
            ebnf=grammar.get("ebnf"),
            structural_tag=grammar.get("structural_tag"),
        ),
        vocab,
        limits,
    )


def grammar_fields(body: CommonBody) -> dict[GrammarKind, str]:
    """The native fields that say what `response_format` and SGLang's extra fields say."""
    fields: dict[GrammarKind, str] = {}
    for kind, text in (
        ("json_schema", body.json_schema),
        ("regex", body.regex),
        ("ebnf", body.ebnf),
    ):
        if text:
            fields[kind] = text  # type: ignore[index]
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return fields
    if fields:
        raise InvalidRequest(EXCLUSIVE, param="response_format")
    if wanted.type == "json_object":
        return {"json_schema": '{"type": "object"}'}
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidRequest(
                "Missing parameter: response_format.json_schema.", param="response_format"
            )
        return {"json_schema": _json(wanted.json_schema.schema)}
    tag = {"structures": wanted.structures, "triggers": wanted.triggers}
    return {"structural_tag": _json(tag)}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
