"""The one chat template that is frozen in the artifact: the checkpoint's, or the one asked for.

A template is rendered once here with the runtime's own renderer, so that what fails for every chat
fails at compile time. Called by `compiler.text`.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jinja2

from compiler.errors import CompileError, DamagedCheckpoint
from runtime.text.chat import ChatTemplate, TemplateRefused

TEMPLATES = Path(__file__).resolve().parent / "data" / "templates"
CHATML = (TEMPLATES / "chatml.jinja").read_text()
MARK = "<a>"  # a message that is looked for in what is rendered
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
DOCUMENTS = [{"title": "t", "text": "d"}]


def templates() -> dict[str, Path]:
    """The named templates: published formats of families, most of whose checkpoints bring none."""
    return {path.stem: path for path in sorted(TEMPLATES.glob("*.jinja"))}


def chat_template(
    directory: Path, settings: dict[str, Any], tokens: dict[str, str], wanted: str | None
) -> str | None:
    """The wanted template (name or file), else the checkpoint's default one; None without any.
    `tokens`: bos_token, eos_token, … as templates see them. Raises CompileError for an unknown
    name, DamagedCheckpoint with the line for a template that does not parse or render.
    """
    own: dict[str, str] = {}
    inside = settings.get("chat_template")
    if isinstance(inside, str):
        own["default"] = inside
    elif isinstance(inside, list):
        own |= {t["name"]: t["template"] for t in inside}
    if (directory / "chat_template.jinja").is_file():
        own["default"] = (directory / "chat_template.jinja").read_text()
    for extra in sorted(directory.glob("additional_chat_templates/*.jinja")):
        own[extra.stem] = extra.read_text()
    if wanted:
        return named_template(wanted, own, tokens)
    source = own.get("default")
    if source is not None:
        check_template(source, str(directory), tokens)
    return source


def named_template(wanted: str, own: dict[str, str], tokens: dict[str, str]) -> str:
    """`own`: the checkpoint's templates, which go first. A path is a file's."""
    source = own.get(wanted)
    if source is None:
        path = templates().get(wanted, Path(wanted).expanduser())
        if not path.is_file():
            choices = ", ".join(sorted({*own, *templates()}))
            raise CompileError(
                f"model.chat_template={wanted}: no such file or template; "
                f"give a .jinja file or one of: {choices}"
            )
        source = path.read_text()
    check_template(source, wanted, tokens)
    return source


def check_template(source: str, where: str, tokens: dict[str, str]) -> None:
    """A template must render one user message: alone, with a tool, or with documents."""
    try:
        template = ChatTemplate(source, tokens)
    except jinja2.TemplateSyntaxError as e:
        raise DamagedCheckpoint(f"chat template of {where}: line {e.lineno}: {e.message}") from e
    message = [{"role": "user", "content": MARK}]
    first: TemplateRefused | None = None
    tries: tuple[dict[str, Any], ...] = (
        {},
        {"tools": [{"type": "function", "function": TOOL}]},
        {"kwargs": {"documents": DOCUMENTS}},
    )
    for extra in tries:
        try:
            template.render(message, **extra)
            return
        except TemplateRefused as e:
            first = first or e
    assert first is not None
    cause = first.__cause__ or first
    line = _line(cause.__traceback__)
    raise DamagedCheckpoint(
        f"chat template of {where}: line {line}: one user message cannot be rendered ({cause}); "
        "give another with model.chat_template"
    ) from first


def _line(trace: TracebackType | None) -> int | str:
    """The template's line in a traceback, which jinja maps to the source."""
    line: int | str = "?"
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
