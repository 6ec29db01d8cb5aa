"""The peer comparison's own parts: shapes, GGUF files, the worker protocol, the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.bandwidth import Rate
from bench.errors import BenchError
from bench.peers import __main__ as peers
from bench.peers.launch import OURS, Skip, Worker, launch, weight_bytes
from bench.peers.shape import Shape
from bench.peers.table import Figures, render
from bench.peers.workloads import Workload, workloads
from bench.windows import windows
from compiler.importer import published_dtype
from conf.bench_schema import PeersConfig

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TINY = Shape.of("toy", CONFIG)


def test_shape_of_a_published_model() -> None:
    shape = Shape.load("smollm-135m")
    count = sum(int(np.prod(s)) for _, s in shape.tensors())
    assert count == 134_515_008  # the published number of parameters
    # Float32 bytes of the matrices: everything but 61 norm vectors of 576.
    assert weight_bytes(shape, "fp32") == 4 * (count - 61 * 576)
    assert published_dtype(shape.config) == "bfloat16"
    assert published_dtype(Shape.load("smollm-135m", "float32").config) == "float32"


def test_workloads() -> None:
    config = PeersConfig(batch=[1, 8], context=[16], prefill=[32], steps=5)
    one, eight, prefill = workloads(config)
    assert [w.label for w in (one, eight, prefill)] == [
        "decode batch 1 at 16",
        "decode batch 8 at 16",
        "prefill 32",
    ]
    assert (eight.tokens, prefill.tokens) == (8, 32)
    assert eight.command(5) == {"do": "decode", "batch": 8, "context": 16, "steps": 7}
    assert eight.seconds({"steps": [9, 9, 1, 2]}) == [1.5]  # two warm-up steps dropped


def test_windows_average_what_overlap_tears_apart() -> None:
    late_then_at_once = [0.02, 0.0] * 8
    assert windows(late_then_at_once) == pytest.approx([0.01, 0.01])
    assert windows([1.0] * 8 + [2.0] * 8 + [9.0]) == [1.0, 2.0]  # an incomplete window is left out
    assert windows([3.0]) == [3.0]


def test_names_are_checked() -> None:
    with pytest.raises(BenchError, match="choices: headstart"):
        peers.check(PeersConfig(peers=["vllm"]))
    with pytest.raises(BenchError, match="int3"):
        peers.check(PeersConfig(precision=["int3"]))


def test_peer_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(Skip, match="make peers"):
        launch("llama.cpp", "fp32", PeersConfig(directory=str(tmp_path)), TINY, 2)


@pytest.mark.parametrize("format", ["f32", "bf16", "q8_0", "q4_0"])
def test_gguf(tmp_path: Path, format: str) -> None:
    gguf = pytest.importorskip("gguf")
    from bench.peers.gguf_file import write_gguf

    path = write_gguf(TINY, format, tmp_path / "toy.gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == 2
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.vocab_size"] == 128
    stored = {t.name: t for t in reader.tensors}
    assert len(stored) == 1 + 2 * 9 + 1  # tied: no output matrix
    expected = dict(TINY.random_weights())
    pairs = {
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    steps = {"f32": 0.0, "bf16": 2**-8, "q8_0": 1 / 127, "q4_0": 1 / 7}
    for ours, theirs in pairs.items():
        tensor = stored[theirs]
        back = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = expected[ours]
        assert back.shape == weight.shape
        limit = steps[format] * np.abs(weight).max() if weight.ndim == 2 else 0.0
        assert np.abs(back - weight).max() <= limit


def test_worker_runs_a_torch_peer() -> None:
    setup = {
        "name": "toy",
        "config": CONFIG,
        "precision": "fp32",
        "threads": 1,
        "max_batch": 2,
        "context": 32,
    }
    worker = Worker("torch", sys.executable, setup, 1, weight_bytes(TINY, "fp32"))
    try:
        assert worker.version.startswith("torch ")
        assert worker.kv_token_bytes == 2 * 2 * 32 * 4  # layers, k and v, two heads of 16, fp32
        assert len(worker.run(Workload(batch=2, context=8), 16)) == 2
        assert worker.run(Workload(batch=0, context=8), 3)[0] > 0
    finally:
        worker.close()


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 16), ("float32", 32)])
def test_ours_reads_what_its_artifact_stores(tmp_path: Path, dtype: str, bits: int) -> None:
    """Float32 arithmetic of both: half the bytes where the checkpoint holds bfloat16."""
    config = PeersConfig(
        model="tiny",
        checkpoint_dtype=dtype,
        directory=str(tmp_path),
        batch=[1],
        context=[8],
        prefill=[8],
    )
    shape = Shape.load("tiny", dtype)
    assert "dtype=float32" in OURS["fp32"]
    worker = launch("headstart", "fp32", config, shape, 1)
    worker.close()
    assert worker.weight_bytes == pytest.approx(weight_bytes(shape, "fp32") * bits / 32, rel=0.05)


def test_worker_that_fails_says_why() -> None:
    with pytest.raises(BenchError, match="torch ended with code 1"):
        Worker("torch", sys.executable, {"nonsense": 1}, 1, 0)


def test_torch_peer_is_a_llama() -> None:
    """The hand-written module equals transformers on the same weights: the race is a fair one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from bench.peers.torch_eager import Llama

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    theirs = {name: p.detach() for name, p in model.named_parameters()}
    ours = Llama(TINY).eval()
    state = {"embed.weight": theirs["model.embed_tokens.weight"]}
    state |= {"norm.weight": theirs["model.norm.weight"], "head.weight": state["embed.weight"]}
    for i in range(TINY.layers):
        source, place = f"model.layers.{i}.", f"layers.{i}."
        qkv = [theirs[f"{source}self_attn.{n}_proj.weight"] for n in "qkv"]
        gate_up = [theirs[f"{source}mlp.{n}_proj.weight"] for n in ("gate", "up")]
        state |= {
            place + "qkv.weight": torch.cat(qkv),
            place + "gate_up.weight": torch.cat(gate_up),
            place + "o.weight": theirs[source + "self_attn.o_proj.weight"],
            place + "down.weight": theirs[source + "mlp.down_proj.weight"],
            place + "norm.weight": theirs[source + "input_layernorm.weight"],
            place + "ffn_norm.weight": theirs[source + "post_attention_layernorm.weight"],
        }
    ours.load_state_dict(state)
    tokens = torch.arange(24).reshape(2, 12) * 5 % 128
    kv = torch.zeros(TINY.layers, 2, 2, TINY.kv_heads, 16, TINY.head_dim)
    with torch.inference_mode():
        expected = model(tokens).logits[:, -1:]
        ours(tokens[:, :-1], kv, 0)
        torch.testing.assert_close(ours(tokens[:, -1:], kv, 11), expected, atol=1e-5, rtol=1e-4)


def test_table() -> None:
    one = Workload(batch=8, context=256)

    def figures(peer: str, seconds: float) -> Figures:
        return Figures(
            precision="fp32",
            peer=peer,
            workload=one,
            seconds=seconds,
            best_seconds=seconds / 2,
            version="1",
            read_bytes=1e9,
            share_of_bound=0.01 / seconds,
        )

    rows = [figures("headstart", 0.02), figures("torch", 0.05)]
    text = render(rows, Rate(best=100e9, median=90e9), 1e9, "toy").splitlines()
    assert text[-2].split()[-5:] == ["400.0", "800.0", "50", "%", "-"]
    assert text[-1].split() == ["torch", "160.0", "320.0", "20", "%", "2.50x"]


def test_result_lines_are_json() -> None:
    from bench.peers.table import result_lines

    rows = [
        Figures(
            precision="fp32",
            peer="torch",
            workload=Workload(batch=0, context=256),
            seconds=0.5,
            best_seconds=0.4,
            version="torch 2",
            read_bytes=1e9,
        )
    ]
    line = json.loads(json.dumps(result_lines(rows, {"fp32": Rate(best=2.0, median=1.0)})))[0]
    assert line["tokens_per_second"] == 512
    assert line["workload"] == "prefill 256"
