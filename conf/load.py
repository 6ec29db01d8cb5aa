"""Command line and YAML groups in, a checked schema object out. The only file that imports hydra
or omegaconf.

Every program ends in `sys.exit(run(Schema, "name", main))`; `load` is the same without the command
line. Hydra composes and expands sweeps (`-m`); it does not own the process: no run directory, no
log file, no traceback for a typo.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError
from conf.options import (
    CONF,
    check_override,
    check_values,
    field_at,
    group_choices,
    help_text,
    hint,
    type_name,
)

T = TypeVar("T")
INTERRUPTED = 130  # what a shell calls a command ended by ^C


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Generic[T]):
    """`config` is the schema object; `sources` says for every option where its value came from:
    `default`, a YAML file or `override`.
    """

    config: T
    sources: dict[str, str]


def run(
    schema: type[T],
    config_name: str,
    main: Callable[[T, Mapping[str, str]], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Run `main(config, sources)` for the command line, once or (`-m`) for every point of the
    sweep. Returns the exit code: the first one that is not 0. An error with an `exit_code` is one
    line on stderr; any other is a bug and keeps its traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if "-h" in args or "--help" in args:
        with contextlib.suppress(BrokenPipeError):  # … | head
            print(help_text(schema, config_name), flush=True)
        return 0
    sweep = any(a in ("-m", "--multirun") for a in args)
    show = "--cfg" in args
    flags = ("-m", "--multirun", "--cfg", *(["job"] if show else []))  # Hydra's own: --cfg job
    overrides = [a for a in args if a not in flags]
    code = 0
    try:
        for job in _jobs(schema, overrides, sweep):
            if sweep:
                print(f"# {' '.join(job)}", file=sys.stderr)
            ended = _run_one(schema, config_name, main, job, show)
            code = code or ended
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return ConfigError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


def _run_one(
    schema: type[T],
    config_name: str,
    main: Callable[[T, Mapping[str, str]], int | None],
    overrides: list[str],
    show: bool,
) -> int:
    try:
        loaded = load(schema, config_name, overrides)
        if show:
            print(OmegaConf.to_yaml(OmegaConf.structured(loaded.config)), end="")
            return 0
        return main(loaded.config, loaded.sources) or 0
    except Exception as e:
        exit_code = getattr(e, "exit_code", None)
        if exit_code is None:
            raise
        print(f"error: {e}", file=sys.stderr)
        return int(exit_code)


def group_values(group: str, name: str) -> dict[str, Any]:
    """One file of a group as it is written: `load` without the rest of a configuration."""
    values = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def load(schema: type[T], config_name: str, overrides: Sequence[str] = ()) -> Loaded[T]:
    """Compose `config_name`.yaml over `schema` with `overrides` (`key=value`) and check every
    value.
    """
    parsed = _parse(overrides)
    texts = [check_override(schema, o.key_or_group, o.value(), o.input_line or "") for o in parsed]
    ConfigStore.instance().store(name=config_name.rsplit("/", 1)[-1] + "_schema", node=schema)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose(config_name, texts, return_hydra_config=True)
        choices = OmegaConf.to_container(composed.hydra.runtime.choices)
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"missing value: {missing[0]}=… is needed{hint(schema, missing[0])}")
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(_explain(schema, e, parsed)) from None
    assert isinstance(config, schema)
    check_values(config)
    assert isinstance(choices, dict)
    chosen = {str(group): choice for group, choice in choices.items()}
    overridden = {o.key_or_group for o in parsed}
    return Loaded(config=config, sources=_sources(config, config_name, chosen, overridden))


# --- the command line ----------------------------------------------------------------------------


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        if text.startswith("-"):
            raise ConfigError(
                f"unknown flag {text}: options are key=value; flags are -m, --cfg and -h"
            )
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"{text!r} is not key=value")
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as e:
            first = " ".join(str(e).split())
            raise ConfigError(f"{text!r} cannot be read ({first}): quote the value") from None
    return parsed


def _jobs(schema: type[Any], overrides: Sequence[str], sweep: bool) -> list[list[str]]:
    parsed = _parse(overrides)
    if sweep:
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        for o in parsed:
            if o.is_sweep_override() and not o.is_discrete_sweep():
                raise ConfigError(f"{o.input_line!r}: a sweep needs a list of values or range(…)")
        return BasicSweeper.split_arguments(parsed, None)[0]
    for o in parsed:
        if o.is_sweep_override():
            raise ConfigError(
                f"{o.input_line!r} has several values: add -m to run one after the other"
            )
    return [list(overrides)]


def _explain(schema: type[Any], error: BaseException, overrides: list[Override]) -> str:
    """One line for whatever hydra or omegaconf objects to."""
    cause: BaseException | None = error
    while cause is not None:
        key = getattr(cause, "full_key", None)
        if key:
            given = next((o for o in overrides if o.key_or_group == key), None)
            found = field_at(schema, key)
            if found and given is not None:
                value = given.get_value_element_as_str()
                return f"{key}={value}: expected {type_name(found[1])}"
            return f"{key}: {str(cause).splitlines()[0]}"
        cause = cause.__cause__ or cause.__context__
    lines = str(error).splitlines()
    for f in fields(schema):
        if f"'{f.name}'" in lines[0] and (choices := group_choices(f.name)):
            return f"missing value: {f.name}=… is needed; choices: {', '.join(choices)}"
    return lines[0]


def _sources(
    config: Any, config_name: str, choices: Mapping[str, str | None], overridden: set[str]
) -> dict[str, str]:
    """Origin of every leaf: `override`, the group file that sets it, the primary file, or
    `default` (the schema).
    """
    origin: dict[str, str] = {}
    files = [(config_name, "")] + [
        (f"{g}/{c}", f"{g}.") for g, c in choices.items() if c and not g.startswith("hydra/")
    ]
    for file, prefix in files:
        content = OmegaConf.load(CONF / f"{file}.yaml")
        for key in _leaves(OmegaConf.to_container(content)):
            if not key.startswith("defaults"):
                origin[prefix + key] = f"conf/{file}.yaml"
    result: dict[str, str] = {}
    for key in _leaves(_plain(config)):
        given = any(key == o or key.startswith(o + ".") for o in overridden - set(choices))
        result[key] = "override" if given else origin.get(key, "default")
    return result


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def _leaves(tree: Any, path: str = "") -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [path] if path else []
    return [leaf for k, v in tree.items() for leaf in _leaves(v, f"{path}.{k}" if path else str(k))]
