"""Logical weights: random ones are the same everywhere and sanely scaled, checkpoint ones are
finite, both concatenate.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compiler.families.register  # noqa: F401 - fills FAMILIES
from compiler.checkpoint import SINGLE, Checkpoint, ConfigReader
from compiler.errors import DamagedCheckpoint
from compiler.families.family import family_of
from compiler.families.names import logical_weights
from compiler.families.spec import ModelSpec
from compiler.hub import locate
from compiler.weights import checkpoint_weights, random_weights, rows, stored
from conf.load import load
from conf.schema import CompileConfig


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    values = load(CompileConfig, "compile", ["model=smollm-135m"]).config.model.config
    reader = ConfigReader({**values, "num_hidden_layers": 3}, "smollm")
    return family_of(reader).read(reader)


def test_random_weights_are_the_same_on_every_machine(spec: ModelSpec) -> None:
    """The digest was computed once; integers and exact scaling leave no room for another answer."""
    values = random_weights(spec, 0).fetch("layers.2.k")
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == GOLDEN


GOLDEN = "0265a6b9de461148538ee895a3fcf9a470bba5c5923087ae84056404539ac645"


def test_random_weights_do_not_depend_on_order_but_on_seed_and_name(spec: ModelSpec) -> None:
    first, second = random_weights(spec, 7), random_weights(spec, 7)
    names = list(first.shapes)
    forward = {n: first.fetch(n) for n in names if n != "embed"}
    assert all(torch.equal(second.fetch(n), forward[n]) for n in reversed(names) if n != "embed")
    assert not torch.equal(forward["layers.0.k"], forward["layers.1.k"])
    assert not torch.equal(forward["layers.0.k"], random_weights(spec, 8).fetch("layers.0.k"))


def test_random_weights_keep_activations_near_one(spec: ModelSpec) -> None:
    weights = random_weights(spec, 0)
    for name, shape in logical_weights(spec).items():
        w = weights.fetch(name)
        assert tuple(w.shape) == shape and w.dtype == torch.float32
        if name.endswith("_norm"):
            assert torch.equal(w, torch.ones(shape))
            continue
        writes = name.endswith((".o", ".down"))
        std = math.sqrt(1 / shape[1] / (2 * len(spec.layers) if writes else 1))
        assert abs(w.mean().item()) < std / 50
        assert w.std().item() == pytest.approx(std, rel=0.02)


def test_rows_concatenate(spec: ModelSpec) -> None:
    weights = random_weights(spec, 0)
    qkv = rows(weights, ("layers.0.q", "layers.0.k", "layers.0.v"))
    assert qkv.shape == (576 + 192 + 192, 576)
    assert torch.equal(qkv[576:768], weights.fetch("layers.0.k"))
    assert torch.equal(rows(weights, ("layers.0.q",)), weights.fetch("layers.0.q"))


def test_stored_forms() -> None:
    x = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.5, 3.4e38, 1e-40], dtype=torch.float32)
    bits = stored(x, "bfloat16")
    assert bits.dtype.name == "uint16"
    # Ties go to the even neighbour: 1 + 2^-8 down, 1 + 3 * 2^-8 up; 3.4e38 rounds beyond the
    # largest number.
    assert bits.tolist()[:5] == [0x3F80, 0x3F80, 0x3F82, 0xC020, 0x7F80]
    assert stored(x, "float32").tobytes() == x.numpy().tobytes()
    with pytest.raises(ValueError, match="float64"):
        stored(x, "float64")


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_checkpoint_with_nan_or_infinity_is_refused(tmp_path: Path, poison: float) -> None:
    tiny = locate("package:tiny", None)
    tensors = load_file(tiny / SINGLE)
    tensors["model.layers.2.mlp.up_proj.weight"][5, 7] = poison
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    checkpoint = Checkpoint.open(tmp_path)
    reader = ConfigReader(checkpoint.config, "config.json")
    family = family_of(reader)
    weights = checkpoint_weights(family, family.read(reader), checkpoint)
    weights.fetch("layers.2.gate")
    with pytest.raises(DamagedCheckpoint, match=r"layers.2.mlp.up_proj.weight holds NaN"):
        weights.fetch("layers.2.up")
