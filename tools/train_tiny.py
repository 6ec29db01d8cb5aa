"""Train the embedded `tiny` model: a 0.9 M parameter Llama on Python's own documentation (PSF
licence).

    python tools/train_tiny.py out=compiler/data/tiny minutes=8 [steps=0 writes random weights]

Comes out: a Hugging Face directory (config.json, model.safetensors in bf16, tokenizer, chat
template). Seeded; run by hand, the result is committed. Half of the text is in chat form, so that
the model answers and stops.
"""

from __future__ import annotations

import ast
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F

V, D, L, H, K, E, WIDTH = 1024, 128, 4, 4, 2, 32, 384
CONTEXT, THETA, EPS = 2048, 10000.0, 1e-5
WINDOW, BATCH, PEAK = 256, 8, 4e-3
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": [0, 2],
    "head_dim": E,
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": WIDTH,
    "max_position_embeddings": CONTEXT,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": H,
    "num_hidden_layers": L,
    "num_key_value_heads": K,
    "pad_token_id": 0,
    "rms_norm_eps": EPS,
    "rope_scaling": None,
    "rope_theta": THETA,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": V,
}
QUESTIONS = [
    "What is {}?",
    "Explain {}.",
    "Tell me about {}.",
    "How do I use {}?",
    "What does {} do?",
]


# --- text -----------------------------------------------------------------------------------------


def docstrings() -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of everything public in the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                if text and len(text) > 40 and text.isascii() and "._" not in name:
                    yield name, text


def corpus(seed: int) -> list[str]:
    """Documents in a fixed order: plain ones, and the same facts as question and answer."""
    from pydoc_data.topics import topics

    rng = random.Random(seed)
    documents = [text for text in topics.values() if text.isascii()]
    for name, text in docstrings():
        first = text.split("\n\n")[0].replace("\n", " ")
        if 30 < len(first) < 400 and ">>>" not in first:
            question = rng.choice(QUESTIONS).format(name)
            documents.append(
                f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{first}<|im_end|>\n"
            )
        documents.append(text)
    rng.shuffle(documents)
    return documents


def train_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=V,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


# --- model: T tokens, B batch, H heads, K kv heads, E head dim ------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.ffn_norm = nn.RMSNorm(D, EPS), nn.RMSNorm(D, EPS)
        self.q, self.o = nn.Linear(D, H * E, bias=False), nn.Linear(H * E, D, bias=False)
        self.k, self.v = nn.Linear(D, K * E, bias=False), nn.Linear(D, K * E, bias=False)
        self.gate, self.up = nn.Linear(D, WIDTH, bias=False), nn.Linear(D, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, D, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor, n: int) -> torch.Tensor:
            return y.unflatten(-1, (n, E)).transpose(1, 2)

        def rotate(y: torch.Tensor) -> torch.Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        h = self.attn_norm(x)
        q, k, v = rotate(heads(self.q(h), H)), rotate(heads(self.k(h), K)), heads(self.v(h), K)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Layer() for _ in range(L))
        self.final_norm = nn.RMSNorm(D, EPS)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(p, std=(D * (2 * L if deep else 1)) ** -0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(tokens.shape[1])[:, None] / THETA ** (torch.arange(0, E, 2) / E)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return F.linear(self.final_norm(x), self.embed.weight)


def train(model: Tiny, stream: torch.Tensor, minutes: float, steps: int) -> None:
    """Stops at `minutes` or `steps`; the learning rate follows whichever is nearer."""
    held, stream = stream[-20 * WINDOW :], stream[: -20 * WINDOW]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(1)
    start = time.monotonic()
    for step in range(steps):
        done = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(
                (step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
            )
        at = torch.randint(len(stream) - WINDOW - 1, (BATCH,), generator=generator)
        batch = torch.stack([stream[i : i + WINDOW + 1] for i in at.tolist()])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            with torch.no_grad():
                x = held[: 19 * WINDOW + 1]
                logits = model(x[:-1].view(19, WINDOW)).flatten(0, 1)
                valid = F.cross_entropy(logits, x[1:]).item()
            print(
                f"step={step} done={done:.2f} loss={loss.item():.3f} valid={valid:.3f}", flush=True
            )


def save(model: Tiny, tokenizer: Tokenizer, out: Path) -> None:
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {n: f"self_attn.{n}_proj" for n in "qkvo"} | {
        n: f"mlp.{n}_proj" for n in ("gate", "up", "down")
    }
    tensors = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.final_norm.weight,
    }
    for i, layer in enumerate(model.layers):
        for name, p in layer.named_parameters():
            tensors[f"model.layers.{i}.{names[name.removesuffix('.weight')]}.weight"] = p
    out.mkdir(parents=True, exist_ok=True)
    packed = {n: t.detach().to(torch.bfloat16).contiguous() for n, t in tensors.items()}
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[0],
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {"bos_token_id": 0, "eos_token_id": [0, 2], "do_sample": True}
    generation |= {"temperature": 0.7, "top_p": 0.9}
    documents = {"config": CONFIG, "tokenizer_config": settings, "generation_config": generation}
    for name, content in documents.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    template = Path(__file__).resolve().parent.parent / "compiler/data/templates/chatml.jinja"
    (out / "chat_template.jinja").write_text(template.read_text())


def main(out: str, minutes: float, steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # at this size more threads only wait for each other
    documents = corpus(0)
    tokenizer = train_tokenizer(documents)
    encoded = tokenizer.encode_batch_fast(documents)
    stream = torch.tensor([t for e in encoded for t in (*e.ids, 0)])
    model = Tiny()
    size = sum(p.numel() for p in model.parameters())
    print(f"documents={len(documents)} tokens={len(stream)} parameters={size}", flush=True)
    train(model, stream, minutes, steps)
    save(model, tokenizer, Path(out))


if __name__ == "__main__":
    given = dict(a.split("=", 1) for a in sys.argv[1:])
    main(given["out"], float(given.get("minutes", 8)), int(given.get("steps", 10**9)))
