"""Plans verify, and the verifier notices every kind of damage to one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_specs import FAMILIES, toy, toy_config

from compiler.check_plan import ArenaSizes, Owners, check_plan
from compiler.design import Design, arena_sizes, design, nodes_of
from compiler.errors import ProgramError
from runtime.artifact import ARENAS, PARAM_ADDRESS, LaunchPlan, decode_plan, encode_plan

MADE = design(toy("qwen3"), toy_config(toy("qwen3")))
BUCKET = MADE.buckets[-1]
PLAN = MADE.plans[BUCKET.name]
NODES = nodes_of(MADE.program, MADE.weights, BUCKET, "cpu")
SIZES = arena_sizes(MADE)


def check(plan: LaunchPlan, sizes: ArenaSizes = SIZES) -> None:
    check_plan(plan, MADE.program, NODES, sizes, {})


def changed(node: int, slot: str, **fields: int) -> LaunchPlan:
    """The plan with one parameter of one node changed."""
    params = PLAN.params.copy()
    row = int(PLAN.nodes[node]["first_param"]) + list(NODES[node].launches[0].slots).index(slot)
    for name, value in fields.items():
        params[row][name] = value
    return LaunchPlan(header=PLAN.header, nodes=PLAN.nodes, params=params)


def address(node: int, slot: str) -> int:
    row = int(PLAN.nodes[node]["first_param"]) + list(NODES[node].launches[0].slots).index(slot)
    return int(PLAN.params[row]["value"])


def first(op: str) -> int:
    return next(i for i, node in enumerate(NODES) if node.call.op == op)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_plans_of_all_families_verify(family: str, scheme: str) -> None:
    made: Design = design(toy(family), toy_config(toy(family), scheme))
    assert set(made.plans) == {bucket.name for bucket in made.buckets}
    again = design(toy(family), toy_config(toy(family), scheme))
    for name, plan in made.plans.items():
        assert encode_plan(plan) == encode_plan(again.plans[name])
        assert encode_plan(decode_plan(encode_plan(plan))) == encode_plan(plan)


LINEAR = next(  # one that reads no residual
    i for i, n in enumerate(NODES) if n.call.op == "linear" and "residual" not in n.call.ins
)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: changed(LINEAR, "ptr:x", value=1 << 40), "expected a multiple of 64 inside"),
        (lambda: changed(LINEAR, "ptr:x", value=address(LINEAR, "ptr:x") + 4), "a multiple of 64"),
        (lambda: changed(LINEAR, "ptr:x", arena=ARENAS.index("io")), "inside the"),
        (lambda: changed(LINEAR, "ptr:x", kind=0), "expected an address"),
        (lambda: changed(LINEAR, "ptr:out", value=address(LINEAR, "ptr:x")), "overlap"),
        (lambda: changed(LINEAR, "ptr:x", value=address(LINEAR, "ptr:out")), "reads 0.h, but"),
        (lambda: changed(LINEAR, "ptr:w.data", value=0), "points to 0"),
        (lambda: changed(LINEAR, "i64:k", value=65), "i64:k is 0x41"),
        (lambda: changed(LINEAR, "ptr:residual", value=64), "is absent"),
        (lambda: changed(first("sample"), "ptr:counts", value=0), "the state lies at"),
        (lambda: changed(first("attention"), "ptr:kv", value=0), "the pages start at"),
        (lambda: changed(first("sample"), "ptr:token", value=0), "the io field lies at"),
    ],
)
def test_damage_is_found(plan, message: str) -> None:
    check(PLAN)
    with pytest.raises(ProgramError) as error:
        check(plan())
    assert message in str(error.value)


def test_wrong_kernel_or_parameter_count_is_found() -> None:
    for field in ("kernel", "params"):
        nodes = PLAN.nodes.copy()
        nodes[3][field] += 1
        with pytest.raises(ProgramError, match="node 3"):
            check(LaunchPlan(header=PLAN.header, nodes=nodes, params=PLAN.params))
    with pytest.raises(ProgramError, match="nodes for"):
        check(LaunchPlan(header=PLAN.header, nodes=PLAN.nodes[:-1], params=PLAN.params))


def test_any_moved_work_address_is_found_or_harmless() -> None:
    """Moving any single temp by one line is either refused or the line was free there."""
    refused = 0
    for row in np.flatnonzero(
        (PLAN.params["kind"] == PARAM_ADDRESS) & (PLAN.params["arena"] == ARENAS.index("work"))
    ):
        params = PLAN.params.copy()
        params[row]["value"] += 64
        try:
            check(LaunchPlan(header=PLAN.header, nodes=PLAN.nodes, params=params))
        except ProgramError:
            refused += 1
    assert refused > 20


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.sampled_from("abc"))))
def test_owners_equal_a_byte_array(writes: list[tuple[int, int, str]]) -> None:
    owners, model = Owners(), [""] * 64
    for start, size, name in writes:
        owners.write(start, start + size, name)
        model[start : start + size] = [name] * size
    for start in range(0, 60, 7):
        assert owners.of(start, start + 4) == set(model[start : start + 4])
