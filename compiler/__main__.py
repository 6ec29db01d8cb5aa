"""`python -m compiler model=<name> [option=value …]`: compiles, prints the artifact's path as
the last line of stdout. Options: conf/schema.py; `-m` sweeps over comma-separated values."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from compiler.pipeline import compile_model
from compiler.progress import Progress
from conf.load import run
from conf.schema import CompileConfig


def main(config: CompileConfig, sources: Mapping[str, str]) -> None:
    print(compile_model(config, sources, Progress()).resolve())


if __name__ == "__main__":
    sys.exit(run(CompileConfig, "compile", main))
