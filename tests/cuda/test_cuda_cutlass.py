"""linear through CUTLASS: cubins of every epilogue and of the search space, their ABI, and what
happens without nvcc. They are run and compared with the reference by the tuner, on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_cuda_linear import call, calls

import kernels.cuda.register  # noqa: F401
from kernels.cuda import nvcc
from kernels.cuda.build import build_cuda
from kernels.cuda.kernel import CudaKernel
from kernels.cuda.linear_cutlass import CutlassConfig
from kernels.cuda.product import SHARED
from kernels.kernel import KERNELS, CallShape
from kernels.launch import Binary, Descriptor, Launch, MapRecipe, Pointer, Source
from kernels.ops.mlp import ACTIVATIONS, GATED
from kernels.toolchain import ToolchainError

(KERNEL,) = [k for k in KERNELS["cuda"] if k.name == "linear_cutlass"]
needs_nvcc = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))
KINDS = {"x": 128, "w": 128}


def product(kernel: CudaKernel, shape: CallShape, config: CutlassConfig) -> Launch:
    assert kernel.accepts(shape) is None
    assert kernel.valid(shape, config) is None, config
    return kernel.launches(shape, config)[-1]


def build(launches: list[Launch], cache: Path) -> list[Binary]:
    sources = [launch.source for launch in launches if launch.source is not None]
    built = build_cuda(sources, cache)
    binaries = []
    for launch, source in zip(launches, sources, strict=True):
        binary = built[source][0]
        # 65536 registers are shared by 384 threads; setmaxnreg then moves them
        assert (binary.stack, binary.registers, binary.block) == (0, 168, 384), source
        assert binary.shared <= SHARED and binary.pdl and binary.scratch == 0
        assert binary.cluster == source.ctas
        assert [p.name for p in binary.parameters] == list(launch.slots)
        assert [p.size for p in binary.parameters] == [KINDS.get(n, 8) for n in launch.slots]
        for name, recipe in binary.maps.items():
            slot = launch.slots[name]
            assert isinstance(slot, Descriptor)
            kind, size = (0, 1) if slot.type == "fp8e4nv" else (9, 2)
            assert recipe == MapRecipe(
                element_type=kind, element_size=size, swizzle=3, box=slot.block
            )
        binaries.append(binary)
    return binaries


def with_all(shape: CallShape, out: str = "bfloat16") -> CallShape:
    """The call with every optional argument the kernel's epilogue knows."""
    rows, outputs = shape.shapes["out"]
    shapes = {
        **shape.shapes,
        "bias": (shape.shapes["w"][0],),
        "residual": (rows + 3, outputs),
        "residual_rows": (rows,),
    }
    dtypes = {**shape.dtypes, "bias": "float32", "residual": "bfloat16", "residual_rows": "int32"}
    attrs = {**shape.attrs, "scale": 0.5, "softcap": 30.0}
    return replace(shape, shapes=shapes, dtypes={**dtypes, "out": out}, attrs=attrs)


def fp8(shape: CallShape) -> CallShape:
    """The same product of fp8 activations and weights."""
    attrs = {**shape.attrs, "x_format": "fp8"}
    return replace(shape, attrs=attrs, formats={"w": "fp8r"})


@needs_nvcc
def test_what_is_refused_and_why() -> None:
    assert KERNEL.tuned_only
    shape = call(512, 2048, 1024)
    assert KERNEL.accepts(shape) is None
    for other, reason in (
        (call(64, 2048, 1024), "64 rows, 65 at least"),
        (call(512, 2048, 1024, "fp8r"), "x is bfloat16, w fp8r: both must be bfloat16"),
        (call(512, 2048, 1024, x="float32"), "x is float32, w bfloat16: both"),
        (call(512, 50257, 1024), "K 1024 and outputs 50257 must be multiples of 8 and 8"),
        (fp8(call(512, 2048, 1000)), "K 1000 and outputs 2048 must be multiples of 16 and 8"),
        (replace(fp8(shape), formats={"w": "bfloat16"}), "w is bfloat16: fp8 activations multiply"),
        (fp8(call(64, 2048, 1024)), "64 rows, 65 at least"),
    ):
        assert (KERNEL.accepts(other) or "").startswith(reason)
    big = CutlassConfig(block_m=256, block_n=256, stages=2)
    assert (KERNEL.valid(shape, big) or "").startswith("tiles of 256 x 256")
    deep = CutlassConfig(block_m=128, block_n=256, stages=5)
    assert "bytes of shared memory" in (KERNEL.valid(shape, deep) or "")
    wide = CutlassConfig(block_m=128, block_n=128, stages=4, cluster=2)
    assert (
        KERNEL.valid(call(100, 2048, 1024), wide) == "clusters of 2 row tiles, the call has fewer"
    )
    twice = CutlassConfig(block_m=256, block_n=128, stages=3)
    assert KERNEL.valid(shape, twice) is None
    assert (KERNEL.valid(fp8(shape), twice) or "").startswith("tiles of 256 x 128, 128 x 192 at")
    narrow = CutlassConfig(block_m=256, block_n=96, stages=4)
    assert KERNEL.valid(fp8(shape), narrow) is None
    reason = KERNEL.valid(fp8(call(512, 2048, 1024, act="swiglu")), narrow)
    assert reason == "tiles of 48 columns, multiples of 32 are written"
    odd = CutlassConfig(block_m=128, block_n=160, stages=4)
    assert (KERNEL.valid(fp8(shape), odd) or "").startswith("block_n 160: one instruction")
    for rows in (100, 512, 4096):
        for one in (call(rows, 2048, 1024), fp8(call(rows, 2048, 1024))):
            assert KERNEL.valid(one, KERNEL.default(one)) is None
            clusters = [config.cluster for config in KERNEL.candidates(one)]
            assert len(clusters) >= 10 and clusters == sorted(clusters)


@needs_nvcc
def test_grid_and_boxes_cover_the_call() -> None:
    shape = call(512, 2 * 3072, 1024, act="swiglu", norm=True)
    first, second = KERNEL.launches(shape, KERNEL.default(shape))
    assert first.source is not None and first.source.function == "linear_tiles.rows_kernel"
    assert KERNEL.workspace(shape, KERNEL.default(shape)) == 512 * 1024 * 2
    x, w = second.slots["x"], second.slots["w"]
    assert isinstance(x, Descriptor) and isinstance(w, Descriptor)
    assert (x.arg, x.shape, x.block) == ("workspace", (512, 1024), (128, 64))
    assert (w.arg, w.shape, w.block) == ("w", (6144, 1024), (128, 64))
    # 4 row tiles times 24 column tiles
    assert second.grid == (96, 1, 1)


@needs_nvcc
def test_grid_and_boxes_of_a_product_of_codes() -> None:
    shape = fp8(call(512, 2048, 1024))
    config = CutlassConfig(block_m=128, block_n=192, stages=5, cluster=2)
    first, second = KERNEL.launches(shape, config)
    assert first.source is not None and first.source.function == "linear_fp8.rows_kernel"
    assert KERNEL.workspace(shape, config) == 512 * 1024 + 512 * 4
    x, w, scales = (second.slots[name] for name in ("x", "w", "x_scale_ptr"))
    assert isinstance(x, Descriptor) and isinstance(w, Descriptor) and isinstance(scales, Pointer)
    assert (x.arg, x.type, x.shape, x.block) == ("workspace", "fp8e4nv", (512, 1024), (128, 128))
    assert (w.arg, w.type, w.shape, w.block) == ("w", "fp8e4nv", (2048, 1024), (96, 128))
    assert scales == first.slots["scales_ptr"] and scales.offset == 512 * 1024
    # 2 clusters of row tiles times 11 column tiles
    assert second.grid == (22, 1, 1)


def test_without_nvcc_every_call_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvcc.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: None)
    monkeypatch.setattr(nvcc, "USUAL", Path("/nowhere"))
    nvcc.missing.cache_clear()
    try:
        reason = KERNEL.accepts(call(512, 2048, 1024))
        assert reason == (
            "nvcc is not installed, it builds the CUTLASS kernels; pip install 'headstart[cutlass]'"
        )
    finally:
        nvcc.missing.cache_clear()


def test_map_types_and_boxes() -> None:
    assert nvcc._recipe("tensordesc<bf16[256, 64]>").box == (256, 64)
    with pytest.raises(ToolchainError, match="sides of 256 at most"):
        nvcc._recipe("tensordesc<bf16[512, 64]>")
    with pytest.raises(ToolchainError, match="rows of 128 bytes"):
        nvcc._recipe("tensordesc<bf16[128, 32]>")
    with pytest.raises(ToolchainError, match="expected one of bf16"):
        nvcc._recipe("tensordesc<fp64[128, 16]>")


@needs_nvcc
@pytest.mark.slow
def test_a_cubin_is_the_same_in_every_build(tmp_path: Path) -> None:
    shape = call(128, 256, 256)
    launch = product(KERNEL, shape, KERNEL.default(shape))
    one, two = (build([launch], tmp_path / name)[0] for name in ("one", "two"))
    assert one == two
    source = launch.source
    assert isinstance(source, Source)
    with pytest.raises(ToolchainError, match='expected the extern "C" function other'):
        build_cuda([replace(source, function="linear_cutlass.other")], tmp_path / "one")
    with pytest.raises(ToolchainError, match=r"linear_cutlass\.cu"):
        build_cuda([replace(source, warps=8)], tmp_path / "one")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("codes", [False, True])
def test_cubins_of_every_epilogue(codes: bool, tmp_path: Path) -> None:
    launches = []
    for act in ("", *ACTIVATIONS, *GATED):
        shape = with_all(call(256, 512, 512), "float32" if act == "gelu" else "bfloat16")
        shape = fp8(shape) if codes else shape
        outputs = 256 if act in GATED else 512
        wide = {"out": (256, outputs), "residual": (259, outputs)}
        shape = replace(shape, shapes={**shape.shapes, **wide}, attrs={**shape.attrs, "act": act})
        launches.append(product(KERNEL, shape, KERNEL.default(shape)))
    build(launches, tmp_path)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("act", "cluster"), [("", 1), ("swiglu", 2)])
def test_cubins_of_the_search_space(act: str, cluster: int, codes: bool, tmp_path: Path) -> None:
    """Every tile and depth, with half of the clusters and orders: a build takes many seconds."""
    shape = call(512, 2 * 1024, 1024, act=act)
    shape = fp8(shape) if codes else shape
    configs = [
        c for c in KERNEL.candidates(shape) if c.cluster == cluster and c.super == 4 * cluster
    ]
    assert len(configs) == (6 if not codes else 4 if act else 5)
    build([product(KERNEL, shape, c) for c in configs], tmp_path)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("codes", [False, True])
def test_cubins_of_real_shapes(codes: bool, tmp_path: Path) -> None:
    shapes = [fp8(s) if codes else s for s in calls("llama3-8b", 4096, "bfloat16")]
    build([product(KERNEL, shape, KERNEL.default(shape)) for shape in shapes], tmp_path)
