"""CPU linear kernels at every level of this machine: float64 formulas, batch invariance, packs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kernels.cpu import linear  # noqa: F401  registers the kernels
from kernels.cpu.layout import WIDENED, fields, pack_linear, parse_format
from kernels.kernel import KERNELS, CallShape
from kernels.toolchain import build_cpu, supported_levels

CACHE = Path("~/.cache/headstart").expanduser()
FORMATS = (
    "float32",
    "bfloat16",
    WIDENED,
    "int8g32",
    "int8g64",
    "int8g128",
    "int4g32",
    "int4g64",
    "int4g128",
)
LEVELS = tuple(level.name for level in supported_levels())
ROUNDS_ROWS = {v.name for v in supported_levels() if "-mavx512bf16" in v.flags}  # to bfloat16
EPS = 1e-5


class Team:
    """The native plan loop with `threads` threads, running one node at a time."""

    def __init__(self, path: Path, threads: int) -> None:
        self.lib = ctypes.CDLL(str(path))
        for name in ("hs_open", "hs_plan"):
            getattr(self.lib, name).restype = ctypes.c_void_p
        self.lib.hs_submit.restype = ctypes.c_int64
        self.lib.hs_wait.restype = ctypes.c_double
        self.team = ctypes.c_void_p(self.lib.hs_open(threads))
        assert self.team.value
        self.plans: list[ctypes.c_void_p] = []

    def run(self, entry: str, slots: list[int | float]) -> None:
        args = (ctypes.c_uint64 * len(slots))()
        for i, slot in enumerate(slots):
            kind = "<f8" if isinstance(slot, float) else "<i8"
            args[i] = int(np.array(slot, kind).view(np.uint64))
        fn = ctypes.c_void_p(ctypes.cast(getattr(self.lib, entry), ctypes.c_void_p).value)
        argv = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        plan = ctypes.c_void_p(self.lib.hs_plan(self.team, 1, ctypes.byref(fn), argv))
        none, zero = ctypes.c_void_p(None), ctypes.c_int64(0)
        ticket = self.lib.hs_submit(self.team, plan, none, none, zero, none, zero, zero)
        assert self.lib.hs_wait(self.team, ctypes.c_int64(ticket)) >= 0
        self.plans.append(plan)

    def close(self) -> None:
        self.lib.hs_close(self.team)
        for plan in self.plans:
            self.lib.hs_plan_free(plan)


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def teams(level: str) -> Iterator[dict[int, Team]]:
    path = build_cpu(level, CACHE)
    teams = {threads: Team(path, threads) for threads in (1, 2, 3)}
    yield teams
    for team in teams.values():
        team.close()


class Weight:
    """A random weight: what is packed, and the float64 matrix it stands for."""

    def __init__(self, fmt: str, n: int, k: int, rng: np.random.Generator, swiglu: bool) -> None:
        self.format, self.n, self.k = fmt, n, k
        self.kind, self.group = parse_format(fmt)
        if self.kind == "float32":
            packed = rng.standard_normal((n, k), np.float32)
            self.value = packed.astype(np.float64)
        elif self.kind in ("bfloat16", WIDENED):
            packed = to_bf16(rng.standard_normal((n, k), np.float32))
            self.value = from_bf16(packed).astype(np.float64)
        else:
            low, high = (-128, 127) if self.kind == "int8" else (-8, 7)
            q = rng.integers(low, high, (n, k), np.int8, endpoint=True)
            scale = rng.uniform(0.5, 2.0, (n, k // self.group)).astype(np.float32) / high
            packed = (q, scale)
            self.value = q * np.repeat(scale.astype(np.float16).astype(np.float64), self.group, 1)
        self.fields = pack_linear(fmt, packed, swiglu)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def quantized(x: np.ndarray, group: int) -> np.ndarray:
    """What the kernel's rows become: int8 per group of K, as float64."""
    x = x.astype(np.float32).reshape(len(x), -1, group)
    top = np.abs(x).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    q = np.rint(x * inverse).astype(np.float64)
    scale = (top * (np.float32(1) / np.float32(127))).astype(np.float64)
    return (q * scale).reshape(len(x), -1)


def aligned(array: np.ndarray) -> np.ndarray:
    out = np.empty(array.nbytes + 64, np.uint8)
    start = -out.ctypes.data % 64
    view = out[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def call(
    team: Team,
    weight: Weight,
    x: np.ndarray,
    *,
    live: int | None = None,
    rows: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    norm: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    in_place: bool = False,
    swiglu: bool = False,
    act: str = "",
    scale: float = 1.0,
    softcap: float = 0.0,
) -> np.ndarray:
    """One kernel call through its registration; untouched output stays NaN."""
    bucket = len(x) if rows is None else len(rows)
    columns = weight.n // 2 if swiglu else weight.n
    out = np.full((bucket + 1, columns), np.nan, np.float32)  # the extra row must stay NaN
    if in_place:
        assert residual is not None
        out[:bucket] = residual
        residual = out
    shapes = {"x": x.shape, "w": (weight.n, weight.k), "out": (bucket, columns)}
    shape = CallShape(
        op="linear",
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, "float32"),
        formats={"w": weight.format},
        attrs={
            "eps": EPS,
            "act": act or ("swiglu" if swiglu else ""),
            "scale": scale,
            "softcap": softcap,
            "live_index": 0 if rows is None else 2,
        },
    )
    (kernel,) = [k for k in KERNELS["cpu"] if k.op == "linear" and k.accepts(shape) is None]
    lives = np.zeros(8, np.int32)
    lives[0 if rows is None else 2] = bucket if live is None else live
    workspace = aligned(np.full(kernel.workspace(shape), 0xFF, np.uint8))
    arrays: dict[str, np.ndarray | None] = {
        "live": lives,
        "x": np.ascontiguousarray(x, np.float32),
        "rows": rows,
        "bias": bias,
        "norm": norm,
        "residual": residual,
        "out": out,
        "workspace": workspace,
        **{f"w.{name}": aligned(field) for name, field in weight.fields.items()},
    }
    scalars = kernel.scalars(shape)
    slots: list[int | float] = []
    for param in kernel.params:
        kind, name = param.split(":")
        array = arrays.get(name)
        if kind == "ptr":
            slots.append(0 if array is None else array.ctypes.data)
        else:
            slots.append(float(scalars[name]) if kind == "f64" else int(scalars[name]))
    team.run(kernel.entry, slots)
    assert np.isnan(out[bucket]).all()
    return out[:bucket]


def expected(
    weight: Weight,
    x: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    norm: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    swiglu: bool = False,
    rounded: bool = True,
    bf16_rows: bool = False,
) -> np.ndarray:
    x = x.astype(np.float64) if rows is None else x[rows].astype(np.float64)
    if norm is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * norm
    if weight.group and rounded:
        x = quantized(x, weight.group)
    if bf16_rows and rounded:
        x = from_bf16(to_bf16(x.astype(np.float32))).astype(np.float64)
    y = x @ weight.value.T
    if bias is not None:
        y = y + bias
    if swiglu:
        gate, up = np.split(y, 2, 1)
        y = gate / (1 + np.exp(-gate)) * up
    return y if residual is None else y + residual


def check(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize(
    "epilogue", ["plain", "norm", "residual", "bias", "swiglu", "norm-swiglu-bias"]
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_against_float64(teams: dict[int, Team], level: str, fmt: str, epilogue: str) -> None:
    group = parse_format(fmt)[1]
    for t, n, k, threads in ((1, 70, 128, 1), (3, 16, 256, 2), (7, 94, 384, 3), (33, 130, 512, 2)):
        if not group:
            k -= 27  # no multiple of anything
        rng = np.random.default_rng([t, n, k, group])
        swiglu = "swiglu" in epilogue
        weight = Weight(fmt, n, k, rng, swiglu)
        x = rng.standard_normal((t, k), np.float32) * rng.uniform(0.1, 10, (t, 1)).astype(
            np.float32
        )
        extra: dict[str, np.ndarray] = {}
        if "norm" in epilogue:
            extra["norm"] = rng.uniform(0.5, 2, k).astype(np.float32)
        if "residual" in epilogue:
            extra["residual"] = rng.standard_normal((t, n), np.float32)
        if "bias" in epilogue:
            extra["bias"] = rng.standard_normal(n, np.float32) * 4
        if swiglu:
            x /= 8
        got = call(teams[threads], weight, x, swiglu=swiglu, **extra)
        want = expected(
            weight, x, swiglu=swiglu, bf16_rows=fmt == "bfloat16" and level in ROUNDS_ROWS, **extra
        )
        # A norm's last bit may move an activation across a rounding boundary; elsewhere the
        # emulation is exact.
        loose = "norm" in epilogue and (group or level in ROUNDS_ROWS)
        check(got, want, 2e-3 if loose else 2e-5 if swiglu else 5e-6)
        exact = expected(weight, x, swiglu=swiglu, rounded=False, **extra)
        check(got, exact, 0.04 if swiglu else 0.02)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if parse_format(fmt)[1]])
def test_any_number_of_groups(teams: dict[int, Team], fmt: str) -> None:
    """Groups are quantized several at a time and the rest fewer: each by its own largest value."""
    group = parse_format(fmt)[1]
    for count in (*range(1, 20), 23, 31, 33, 47):
        rng = np.random.default_rng([count, group])
        weight = Weight(fmt, 32, count * group, rng, False)
        x = rng.standard_normal((2, count, group), np.float32)
        x *= 4.0 ** rng.integers(-3, 4, (2, count, 1)).astype(np.float32)
        x[0, count // 2] = 0
        x = x.reshape(2, -1)
        check(call(teams[1], weight, x), expected(weight, x), 5e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_row_with_an_epilogue_does_not_depend_on_its_batch(
    teams: dict[int, Team], fmt: str
) -> None:
    rng = np.random.default_rng(9)
    for act, gated in (("geglu_tanh", True), ("geglu", True), ("gelu", False), ("relu2", False)):
        weight = Weight(fmt, 96, 128, rng, gated)
        x, bias = rng.standard_normal((30, 128), np.float32), rng.standard_normal(96, np.float32)
        more = {"bias": bias, "swiglu": gated, "act": act, "scale": 0.3, "softcap": 2.0}
        alone = np.concatenate([call(teams[1], weight, x[i : i + 1], **more) for i in range(30)])
        for t in (2, 5, 9, 17, 30):
            assert np.array_equal(call(teams[1 + t % 3], weight, x[:t], **more), alone[:t])


@pytest.mark.parametrize("fmt", FORMATS)
def test_row_does_not_depend_on_its_batch(teams: dict[int, Team], fmt: str) -> None:
    rng = np.random.default_rng(7)
    for n, k, swiglu in ((48, 384, False), (96, 640, True)):
        weight = Weight(fmt, n, k, rng, swiglu)
        norm = rng.uniform(0.5, 2, k).astype(np.float32)
        x = rng.standard_normal((70, k), np.float32)
        alone = np.concatenate(
            [call(teams[1], weight, x[i : i + 1], norm=norm, swiglu=swiglu) for i in range(70)]
        )
        for t in (*range(2, 34), 47, 64, 70):
            got = call(teams[1 + t % 3], weight, x[:t], norm=norm, swiglu=swiglu)
            assert np.array_equal(got, alone[:t]), f"{t} rows"


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", WIDENED, "int8g32", "int4g128"])
def test_rows_beyond_the_cache_blocks(teams: dict[int, Team], fmt: str) -> None:
    """So long a K that the rows are worked on in several chunks."""
    rng = np.random.default_rng(11)
    weight = Weight(fmt, 40, 8192, rng, False)
    x = rng.standard_normal((203, 8192), np.float32)
    got = call(teams[2], weight, x)
    for i in (0, 95, 96, 127, 128, 136, 191, 192, 202):
        assert np.array_equal(got[i : i + 1], call(teams[1], weight, x[i : i + 1])), f"row {i}"
    check(got, expected(weight, x, rounded=False), 0.02)


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", WIDENED, "int8g32", "int4g64"])
def test_levels_agree(teams: dict[int, Team], level: str, fmt: str) -> None:
    """Integer dots are exact: levels differ by float rounding; some round rows of bf16."""
    rng = np.random.default_rng(3)
    weight = Weight(fmt, 64, 512, rng, False)
    x = rng.standard_normal((20, 512), np.float32)
    got = call(teams[2], weight, x)
    want = expected(weight, x, bf16_rows=fmt == "bfloat16" and level in ROUNDS_ROWS)
    check(got, want, 3e-6)


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "int8g32", "int4g32"])
def test_only_live_rows_are_written(teams: dict[int, Team], fmt: str) -> None:
    rng = np.random.default_rng(5)
    weight = Weight(fmt, 40, 64, rng, False)
    x = rng.standard_normal((24, 64), np.float32)
    full = call(teams[1], weight, x)
    for live in (0, 1, 5, 11, 17):
        got = call(teams[2], weight, x, live=live)
        assert np.array_equal(got[:live], full[:live])
        assert np.isnan(got[live:]).all()


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "int8g32", "int4g32"])
@pytest.mark.parametrize("count", [2, 13])
def test_gathered_rows(teams: dict[int, Team], fmt: str, count: int) -> None:
    rng = np.random.default_rng(6)
    weight = Weight(fmt, 100, 96, rng, False)
    norm = rng.uniform(0.5, 2, 96).astype(np.float32)
    x = rng.standard_normal((30, 96), np.float32)
    rows = rng.integers(0, 30, count).astype(np.int32)
    got = call(teams[2], weight, x, rows=rows, norm=norm)
    assert np.array_equal(got, call(teams[1], weight, x, norm=norm)[rows])


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "int8g32", "int4g32"])
@pytest.mark.parametrize("t", [1, 9, 20])
def test_residual_in_place(teams: dict[int, Team], fmt: str, t: int) -> None:
    rng = np.random.default_rng(8)
    weight = Weight(fmt, 50, 64, rng, False)
    x, residual = rng.standard_normal((t, 64), np.float32), rng.standard_normal((t, 50), np.float32)
    got = call(teams[2], weight, x, residual=residual, in_place=True)
    assert np.array_equal(got, call(teams[1], weight, x, residual=residual))


def test_widened_rows_have_the_bits_of_float32(teams: dict[int, Team]) -> None:
    """Whatever the number of rows, so in every kind of block, and over several pieces of K."""
    rng = np.random.default_rng(12)
    for n, k, gated in ((70, 357, False), (64, 1536, True), (40, 4096, False)):
        weight = Weight(WIDENED, n, k, rng, gated)
        whole = Weight("float32", n, k, rng, gated)
        whole.fields = pack_linear("float32", weight.value.astype(np.float32), gated)
        assert weight.fields["data"].nbytes <= whole.fields["data"].nbytes * 384 / 357 / 2
        x, norm = rng.standard_normal((70, k), np.float32), rng.uniform(0.5, 2, k)
        more = {"norm": norm.astype(np.float32), "swiglu": gated}
        for t in (*range(1, 14), 24, 33, 70):
            team = teams[1 + t % 3]
            got, want = call(team, weight, x[:t], **more), call(team, whole, x[:t], **more)
            assert got.tobytes() == want.tobytes(), f"{t} rows of {k}"


@pytest.mark.parametrize("fmt", ["int8g32", "int4g32"])
def test_extreme_values_do_not_saturate(teams: dict[int, Team], fmt: str) -> None:
    rng = np.random.default_rng(9)
    weight = Weight(fmt, 32, 64, rng, False)
    lowest = -128 if fmt == "int8g32" else -8
    q = np.full((32, 64), lowest, np.int8)
    weight.value = q * np.ones((1, 64))
    weight.fields = pack_linear(fmt, (q, np.ones((32, 2), np.float32)))
    x = np.where(np.arange(64) % 3 == 0, -1.0, 1.0).astype(np.float32)[None].repeat(20, 0)
    x[3] = 0
    for t in (1, 20):
        check(call(teams[1], weight, x[:t]), expected(weight, x[:t]), 1e-6)


def test_fields_describe_what_is_packed() -> None:
    rng = np.random.default_rng(1)
    for fmt in FORMATS:
        for n, k, swiglu in ((48, 128, False), (50, 256, False), (24, 128, True)):
            packed = Weight(fmt, n, k, rng, swiglu).fields
            described = fields(fmt, n, k, swiglu)
            assert {f: (str(a.dtype), a.shape) for f, a in packed.items()} == described


def test_refusals_name_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"K=96 .* group 64"):
        fields("int8g64", 16, 96)
    with pytest.raises(ValueError, match=r"group 48.*32"):
        parse_format("int4g48")
    with pytest.raises(ValueError, match="int2g32"):
        parse_format("int2g32")
    with pytest.raises(ValueError, match=r"N=33 is odd"):
        fields("float32", 33, 16, True)
    with pytest.raises(ValueError, match=r"-8\.\.7, got .*9"):
        pack_linear("int4g32", (np.full((16, 32), 9, np.int8), np.ones((16, 1), np.float32)))
    with pytest.raises(ValueError, match="70000"):
        pack_linear("int8g32", (np.ones((16, 32), np.int8), np.full((16, 1), 70000, np.float32)))
