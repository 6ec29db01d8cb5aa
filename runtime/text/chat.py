"""Chat messages to one prompt text, through the artifact's frozen Jinja template.

Comes in: the template and one request's messages. Goes out: the prompt. The sandbox stops attribute
tricks but is no resource limit, so the server renders in a child process it can kill
(runtime/text/render_worker.py); tests and offline use call `ChatTemplate` directly.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Names a request may pass through chat_template_kwargs; templates look for these and nothing else
# that a client should set.
KWARGS = frozenset(
    {"enable_thinking", "thinking", "reasoning_effort", "date_string", "builtin_tools"}
    | {"tools_in_user_message", "documents", "add_generation_prompt", "preserve_thinking"}
)

# Names under which a message's reasoning comes, the standard one first.
REASONING = ("reasoning_content", "thinking", "reasoning")
TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # as transformers: it ends with a space to see trimming


class TemplateRefused(Exception):
    """The template raised, or its output is beyond bounds; the text may be shown to the client."""


class ChatTemplate:
    """Compiled once. `constants` are the names every render sees (bos_token, eos_token, …)."""

    def __init__(self, source: str, constants: dict[str, str]) -> None:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = env.from_string(source)
        self._constants = constants

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: dict[str, Any] | None = None,
        most: int = 1 << 24,
    ) -> str:
        """`most`: characters of output before the request is refused."""
        allowed = {k: v for k, v in (kwargs or {}).items() if k in KWARGS}
        names = allowed | self._constants
        messages = list(map(_with_reasoning, messages))
        if continue_final_message:
            messages[-1:] = [_tagged(messages[-1] if messages else {})]
        names |= {"messages": messages, "tools": tools, "documents": allowed.get("documents")}
        names["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(names):
                size += len(part)
                if size > most:
                    raise TemplateRefused(f"the rendered chat is longer than {most} characters.")
                parts.append(part)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            # What a template does with odd messages is the request's fault; library text stays in.
            said = error.message if isinstance(error, _Raised) else None
            raise TemplateRefused(
                said or "the chat template cannot render these messages."
            ) from error
        prompt = "".join(parts)
        return _cut_at_tag(prompt) if continue_final_message else prompt


class _Raised(jinja2.TemplateError):
    """`raise_exception` called by the template: its text is part of the frozen artifact."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training. Here its body is only rendered, in a
    scope of its own, as transformers does.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As the models saw it in training: without jinja's HTML escaping."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise _Raised(str(message)[:300])


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates look for a message's reasoning under one of two names, clients send a third."""
    said = next((message[k] for k in REASONING if message.get(k) is not None), None)
    return message if said is None else {"thinking": said, **message, "reasoning_content": said}


def _tagged(message: dict[str, Any]) -> dict[str, Any]:
    """The message to be continued, its last text marked with where it ends."""
    content = message.get("content")
    if isinstance(content, list):
        last = max((i for i, part in enumerate(content) if part.get("type") == "text"), default=-1)
        if last >= 0 and content[last].get("text", "").strip():
            tagged = content[last] | {"text": content[last]["text"] + TAG}
            return message | {"content": [*content[:last], tagged, *content[last + 1 :]]}
    elif isinstance(content, str) and content.strip():
        return message | {"content": content + TAG}
    raise TemplateRefused("continue_final_message needs text in the last message.")


def _cut_at_tag(prompt: str) -> str:
    """The prompt up to the end of the last message's text, so that the model goes on writing it."""
    found = prompt.rfind(TAG.strip())
    if found < 0:
        raise TemplateRefused("continue_final_message: the template rewrites the last message.")
    if prompt.startswith(TAG, found):
        return prompt[:found]
    return prompt[:found].rstrip()  # the template trims messages: the tag kept their last spaces
