"""`python -m compiler.families`: the supported families and what they are made of.

python -m compiler.families                       for people
python -m compiler.families --write FILE          between the marks in docs/models.md
python -m compiler.families --fit llama3-70b      bytes per rank, by tensor-parallel degree
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compiler.errors import CompileError
from compiler.families.table import markdown, named_shapes, read_shape, rows, text
from compiler.model import KV_BYTES, StepShape
from compiler.quantize import register  # noqa: F401  (fills SCHEMES)
from compiler.quantize.scheme import SCHEMES, storage_formats
from compiler.ranks import rank_fit
from compiler.report import size
from runtime.errors import UsageError

BEGIN, END = "<!-- families -->\n", "<!-- end -->\n"
DEGREES = (1, 2, 4, 8)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compiler.families", description="The supported model families."
    )
    parser.add_argument("--write", type=Path, help="a Markdown file with the marks of the table")
    parser.add_argument("--fit", metavar="MODEL", help="a named shape: bytes per rank")
    parser.add_argument("--dtype", choices=sorted(KV_BYTES), default="bfloat16")
    parser.add_argument("--quant", choices=("none", *sorted(SCHEMES)), default="none")
    parser.add_argument("--group-size", type=int, default=64)
    given = parser.parse_args(arguments)
    try:
        if given.fit:
            print(fit(given.fit, given.dtype, given.quant, given.group_size), end="")
        elif given.write:
            given.write.write_text(written(given.write.read_text()))
        else:
            print(text(rows()), end="")
    except (CompileError, UsageError) as error:
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


def fit(name: str, dtype: str, quant: str, group: int) -> str:
    """A line per tensor-parallel degree; what cannot be cut says why."""
    if name not in named_shapes():
        raise UsageError(f"--fit {name}: not a named shape; choices: {', '.join(named_shapes())}")
    _, spec = read_shape(name)
    formats = storage_formats(spec, dtype=dtype, scheme=quant, group=group, head=False)
    shape = StepShape(slots=1, edits=0, page_size=16, kv_dtype=dtype, context=spec.context)
    lines = [f"{name}, {spec.parameters() / 1e9:.2f} B parameters"]
    for tp in DEGREES:
        try:
            figures = rank_fit(spec, formats, shape, tp)
        except CompileError as error:
            lines.append(f"tp {tp}  {error}")
            continue
        lines.append(
            f"tp {tp}  weights {size(figures['weights'])} per rank, "
            f"{size(figures['kv_token'])} per token of context"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
