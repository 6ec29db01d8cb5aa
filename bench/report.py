"""Results as a table or a plot: `python -m bench.report files=[a.jsonl,b.jsonl] [plot=out.png x=…
y=… by=…]`. Reads what the benchmarks append to their output_file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import matplotlib
import pandas as pd

from bench import results
from bench.compare import METRICS, SETTINGS, flatten
from bench.errors import BenchUsage
from conf.bench_schema import ReportConfig
from conf.load import run


def frame(config: ReportConfig) -> pd.DataFrame:
    """One row per result; `columns`, or the settings and main figures of the benchmarks found."""
    if not config.files:
        raise BenchUsage("files=[…] is empty: name result files")
    rows: list[dict[str, Any]] = []
    for path in config.files:
        rows += [flat for line in results.read(path) for flat in flatten(line)]
    kinds = list(dict.fromkeys(str(r.get("bench")) for r in rows))
    wanted = config.columns or [
        *(["bench"] if len(kinds) > 1 else []),
        *(["run_name"] if any("run_name" in r for r in rows) else []),
        *(name for kind in kinds for name in (*SETTINGS.get(kind, ()), *METRICS.get(kind, ()))),
    ]
    wanted = list(dict.fromkeys(wanted))
    table = pd.DataFrame(rows)
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        raise BenchUsage(f"columns: no {missing[0]!r}; there are {', '.join(table.columns)}")
    return table if config.plot else table[wanted]


def plot(table: pd.DataFrame, config: ReportConfig) -> None:
    """`y` over `x`, one line per value of `by`."""
    assert config.plot is not None
    for name in (config.x, config.y, config.by):
        if name not in table.columns:
            raise BenchUsage(f"plot: no column {name!r}; there are {', '.join(table.columns)}")
    matplotlib.use("Agg")  # a file, never a window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for value, group in table.groupby(config.by):
        line = group.groupby(config.x)[config.y].median()
        axes.plot(line.index, line.to_numpy(), marker="o", label=str(value))
    axes.set_xlabel(config.x)
    axes.set_ylabel(config.y)
    axes.legend(title=config.by)
    axes.grid(alpha=0.3)
    figure.savefig(config.plot, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main(config: ReportConfig, sources: Mapping[str, str]) -> int:
    table = frame(config)
    if config.plot:
        plot(table, config)
        print(config.plot)
    else:
        print(table.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}"))
    return 0


if __name__ == "__main__":
    sys.exit(run(ReportConfig, "bench/report", main))
