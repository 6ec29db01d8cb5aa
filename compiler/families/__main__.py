"""`python -m compiler.families`: the supported families and what they are made of.

python -m compiler.families                       for people
python -m compiler.families --write FILE          between the marks in docs/models.md
python -m compiler.families --fit llama3-70b target=h200 quant=int8 …
                                                  bytes per rank, by tensor-parallel degree
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compiler.errors import CompileError
from compiler.families.table import markdown, named_shapes, rows, shape_of, text
from compiler.importer import published_dtype
from compiler.ranks import rank_fit
from compiler.report import arenas
from conf.errors import ConfigError
from conf.load import load
from conf.resolve import resolve, settle_target
from conf.schema import CompileConfig
from runtime.device.machine import gpu_names
from runtime.errors import UsageError

BEGIN, END = "<!-- families -->\n", "<!-- end -->\n"
DEGREES = (1, 2, 4, 8)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compiler.families", description="The supported model families."
    )
    parser.add_argument("--write", type=Path, help="a Markdown file with the marks of the table")
    parser.add_argument("--fit", metavar="MODEL", help="a named shape: bytes per rank")
    parser.add_argument("overrides", nargs="*", help="with --fit: options of a compile, key=value")
    given = parser.parse_args(arguments)
    try:
        if given.overrides and not given.fit:
            raise UsageError(f"{given.overrides[0]}: options of a compile belong to --fit MODEL")
        if given.fit:
            print(fit(given.fit, given.overrides), end="")
        elif given.write:
            given.write.write_text(written(given.write.read_text()))
        else:
            print(text(rows()), end="")
    except (CompileError, ConfigError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def written(page: str) -> str:
    """The page with the table of now between its marks."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise UsageError(f"the file has no {BEGIN.strip()} … {END.strip()} to write between")
    return f"{before}{BEGIN}\n{markdown(rows())}\n{END}{after}"


def fit(name: str, overrides: Sequence[str]) -> str:
    """A line per tensor-parallel degree; what cannot be cut says why. `overrides`: as a compile
    takes them."""
    if name not in named_shapes():
        raise UsageError(f"--fit {name}: not a named shape; choices: {', '.join(named_shapes())}")
    loaded = load(CompileConfig, "compile", [f"model={name}", "weights=random", *overrides])
    _, spec = shape_of(loaded.config.model)
    published = published_dtype(loaded.config.model.config)
    config, sources = settle_target(loaded.config, loaded.sources, gpu_names())
    config, _ = resolve(
        config,
        sources,
        checkpoint_dtype=published,
        context=spec.context,
        whole=spec.whole,
    )
    shape = config.shape
    lines = [
        f"{name}, {spec.parameters() / 1e9:.2f} B parameters, target={config.target.name} "
        f"dtype={config.dtype} shape.context={shape.context} shape.max_seqs={shape.max_seqs} "
        f"shape.max_tokens={shape.max_tokens}; on each rank:"
    ]
    for tp in DEGREES:
        try:
            figures = rank_fit(spec, config, tp, lambda name: published == "bfloat16")
            lines.append(f"tp {tp}  {arenas(figures)}")
        except CompileError as error:
            lines.append(f"tp {tp}  {error}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
