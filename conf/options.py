"""The schema as data: which options exist, what they accept, where a wrong one meant to go.

Pure functions over the dataclasses of `conf.schema` and the names of the YAML groups, used by
`conf.load` for messages and checks. No hydra here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import getdoc
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from conf.errors import ConfigError
from conf.schema import NO_LIMIT

CONF = Path(__file__).resolve().parent


def group_choices(group: str) -> list[str]:
    """Names of the YAML files of a group, sorted."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def _check_choice(group: str, value: Any, text: str) -> None:
    choices = group_choices(group)
    if not choices:
        raise ConfigError(
            f"{text!r}: {group} is a group of options; set one of them, {group}.<name>=…"
        )
    if value not in choices:
        raise ConfigError(
            f"{group}={value}: no such choice{_closest(str(value), choices)}; "
            f"choices: {', '.join(choices)}"
        )


def _closest(word: str, among: Sequence[str]) -> str:
    match = difflib.get_close_matches(word, among, 1, 0.6)
    return f", did you mean {match[0]}?" if match else ""


def check_override(schema: type[Any], key: str, value: Any, text: str) -> str:
    """The override as hydra shall see it; raises if the key does not exist or names a group choice
    that does not.
    """
    node: Any = schema
    metadata: Mapping[str, Any] = {}
    path: list[str] = []
    for part in key.split("."):
        hints = get_type_hints(node)
        if part not in hints:
            where = ".".join(path)
            options = [".".join((*path, n)) for n in hints]
            inside = f" of {where}" if where else ""
            raise ConfigError(
                f"unknown option {key}{_closest('.'.join((*path, part)), options)}; "
                f"options{inside}: {', '.join(options)}"
            )
        path.append(part)
        metadata = next(f.metadata for f in fields(node) if f.name == part)
        node = hints[part]
        if not is_dataclass(node):
            break
    free = "dict" in str(node)  # entries of a dict may be added
    if len(path) < len(key.split(".")) and not free:
        raise ConfigError(f"unknown option {key}: {'.'.join(path)} has no parts")
    if text[0] in "+~" and not free:
        raise ConfigError(f"{text!r}: {key} is a fixed option; write it without {text[0]!r}")
    if is_dataclass(node):
        _check_choice(key, value, text)
    if free and text[0] not in "+~":
        text = "++" + text
    if node is str and value is None and text.endswith("=null"):
        text = f"{key}='null'"  # a name like any other where no value is not an option
    if value is None and metadata.get("none"):
        text = f"{key}={NO_LIMIT}"
    if get_origin(node) is list and value is not None and not isinstance(value, list):
        text = f"{key}=[{text.partition('=')[2]}]"  # one is a list of one
    return text


def field_at(schema: type[Any], key: str) -> tuple[Field[Any], Any] | None:
    """The dataclass field and type at a dotted key (None inside a dict)."""
    node: Any = schema
    found: Field[Any] | None = None
    for part in key.split("."):
        if not is_dataclass(node):
            return None
        found = next((f for f in fields(node) if f.name == part), None)
        if found is None:
            return None
        node = get_type_hints(node)[part]
    return (found, node) if found else None


def type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    parts = get_args(kind)
    if type(None) in parts:
        return " or ".join([*(type_name(p) for p in parts if p is not type(None)), "null"])
    if get_origin(kind) is list:
        return "a list like [1,2]" if parts == (int,) else "a list like [a,b]"
    if get_origin(kind) is dict:
        return "entries, one by one: <option>.<entry>=…"
    return names.get(kind, str(kind))


def hint(schema: type[Any], key: str) -> str:
    found = field_at(schema, key)
    if found is None:
        return ""
    field, kind = found
    if is_dataclass(kind) or (choices := group_choices(key)):
        choices = group_choices(key)
        return f"; choices: {', '.join(choices)}" if choices else ""
    if field.metadata.get("choices"):
        return f"; choices: {', '.join(field.metadata['choices'])}"
    return f" ({type_name(kind)})"


def check_values(config: Any, path: str = "") -> None:
    """`choices` and `low`/`high` of `conf.schema.option`."""
    for f in fields(config):
        key, value = path + f.name, getattr(config, f.name)
        if is_dataclass(value):
            check_values(value, key + ".")
            continue
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(
                f"{key}={value}: not a choice{_closest(str(value), choices)}; "
                f"choices: {', '.join(choices)}"
            )
        low, high = f.metadata.get("low"), f.metadata.get("high")
        for v in value if isinstance(value, list) else [value]:
            if v is None or isinstance(v, str):
                continue
            if (low is not None and not v >= low) or (high is not None and not v <= high):
                span = f"{low} to {high}" if high is not None else f"at least {low}"
                raise ConfigError(f"{key}={v}: out of range, must be {span}")


def help_text(schema: type[Any], config_name: str) -> str:
    lines = [
        f"options of {config_name.replace('/', '.')}: key=value; -m sweeps key=a,b; "
        "--cfg prints what was composed",
        *_about(schema, ""),
        "",
    ]

    def walk(node: type[Any], path: str) -> None:
        hints = get_type_hints(node)
        for f in fields(node):
            key, kind = path + f.name, hints[f.name]
            if is_dataclass(kind):
                choices = group_choices(key)
                if choices:
                    lines.append(f"  {key}=  choices: {', '.join(choices)}")
                assert isinstance(kind, type)
                lines.extend(_about(kind, "  "))
                walk(kind, key + ".")
            else:
                among = " | ".join(f.metadata.get("choices", ())) or type_name(kind)
                if f.metadata.get("none"):
                    among += " or null"
                lines.append(f"  {key}=  {among}{_default(f)}")

    walk(schema, "")
    return "\n".join(lines)


def _about(schema: type[Any], indent: str) -> list[str]:
    """What the schema says of itself (a dataclass without a docstring has a signature there)."""
    text = getdoc(schema) or ""
    return [] if text.startswith(f"{schema.__name__}(") else [indent + s for s in text.splitlines()]


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value == "???" or isinstance(value, dict):
        return ""
    if isinstance(value, list):
        return f"  [[{','.join(map(str, value))}]]"
    words = {"None": "null", "True": "true", "False": "false"}
    return f"  [{words.get(str(value), value)}]"
