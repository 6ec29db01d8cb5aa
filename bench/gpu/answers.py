"""The open questions about the driver, answered in words from what a run found:
`python -m bench.gpu.answers <result file> …` prints the table of docs/cuda.md with its states.

Comes in: the document that `bench.gpu` writes. Goes out: an answer for each question, None where
the run did not find one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.gpu.documents import printed

Found = Mapping[str, Any]  # figures of the probes, and under `contracts` those of that section


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`answer` may look up what is not there: then there is none. `meanwhile`: what the code does
    until it is known."""

    text: str
    by: str
    answer: Callable[[Found], str]
    meanwhile: str = ""


def yes(right: object) -> str:
    return "yes" if right else "NO"


def _cubins(found: Found) -> str:
    probe, contracts = found["cubin_abi"], found["contracts"]
    parts = [
        f"ABI {probe[name]['elf_abi']}: {yes(probe[name]['right'])}" for name in ("ours", "newer")
    ]
    return (
        f"{', '.join(parts)} (driver {probe['driver']}); {contracts['cases']} cases of "
        f"{contracts['kernels']} kernels, {contracts['failed']} wrong"
    )


def _offsets(found: Found) -> str:
    # Loading compares every parameter of every kernel and refuses a difference.
    offset = found["tensor_maps"]["offset"]
    return f"yes, for every kernel loaded; a tensor map lies at offset {offset}"


def _maps(found: Found) -> str:
    return f"{yes(found['tensor_maps']['right'])}, by the copy of a matrix through one"


def _edges(found: Found) -> str:
    e = found["programmatic_edges"]
    return (
        f"correct: {yes(e['programmatic_right'])}; {e['programmatic_us_per_node']:.2f} us a node "
        f"instead of {e['full_us_per_node']:.2f}"
    )


def _addresses(found: Found) -> str:
    w = found["wished_addresses"]
    return f"alone: {yes(w['alone'] is True)}; with torch: {yes(w['with_torch'] is True)}"


def _costs(found: Found) -> str:
    cost, update = found["graph_cost"], found["node_updates"]
    return (
        f"adding and instantiating {cost['1000_make_us_per_node']:.2f} us a node of 1000, "
        f"{cost['5000_make_us_per_node']:.2f} of 5000; setting one {update['us_per_node']:.2f} us"
    )


def _clusters(found: Found) -> str:
    c = found["clusters"]
    with_it = f"right with it: {yes(c['with_attribute_right'])}"
    return f"{with_it}; without it: {c['without_attribute']}"


def _views(found: Found) -> str:
    views = found["torch_views"]
    said = []
    for name, label in (("array_interface", "array interface"), ("dlpack", "DLPack")):
        view = views[name]
        good = view.get("aliases") and view.get("right")
        said.append(f"{label}: {view.get('refused') or yes(good)}")
    return f"{'; '.join(said)} (torch {views['torch']})"


def _bindings(found: Found) -> str:
    return str(found["bindings"]["cuda_bindings"])


QUESTIONS = (
    Question(
        text="Do the cubins (ELF ABI 7 and 8) load and give right results?",
        by="`cubin_abi`, section `contracts`",
        answer=_cubins,
    ),
    Question(
        text="Does the driver report the parameter offsets the cubin declares?",
        by="`tensor_maps`",
        answer=_offsets,
        meanwhile="compared at every load",
    ),
    Question(
        text="Do kernel nodes with tensor maps and null scratch run?",
        by="`tensor_maps`",
        answer=_maps,
        meanwhile="device-made descriptors, which need scratch, are refused",
    ),
    Question(
        text="Are programmatic edges correct, and what do they save?",
        by="`programmatic_edges`",
        answer=_edges,
    ),
    Question(
        text="Are wished arena addresses granted, with and without torch?",
        by="`wished_addresses`",
        answer=_addresses,
        meanwhile="a plan is relocated to any address",
    ),
    Question(
        text="What do adding, instantiating and setting a node cost?",
        by="`graph_cost`, `node_updates`",
        answer=_costs,
    ),
    Question(
        text="Does a cluster kernel need the attribute on its node?", by="`clusters`",
        answer=_clusters,
    ),
    Question(text="Can torch view mapped memory?", by="`torch_views`", answer=_views),
    Question(
        text="Which cuda-bindings does the machine have?", by="`bindings`", answer=_bindings
    ),
)  # fmt: skip


def answers(document: Mapping[str, Any]) -> list[str | None]:
    """In the order of QUESTIONS."""
    found: dict[str, Any] = {}
    for record in document["sections"]:
        if record["section"] == "probes":
            found |= record.get("figures", {})
        elif record["section"] == "contracts" and "figures" in record:
            found["contracts"] = record["figures"]
    out: list[str | None] = []
    for question in QUESTIONS:
        try:
            out.append(question.answer(found))
        except (KeyError, TypeError):  # the probe did not run, or failed
            out.append(None)
    return out


def table(states: list[str | None]) -> str:
    lines = ["| # | question | state | answered by |", "|---|---|---|---|"]
    for number, (question, state) in enumerate(zip(QUESTIONS, states, strict=True), 1):
        unknown = f"open; {question.meanwhile}" if question.meanwhile else "open"
        lines.append(f"| {number} | {question.text} | {state or unknown} | {question.by} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(printed("answers", lambda document: table(answers(document))))
