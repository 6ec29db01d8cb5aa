"""A minimal artifact for the null device: manifest, toy tokenizer and template, no weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from runtime import weights_file
from runtime.artifact import Artifact, plan_path, weights_path
from runtime.device.native import ABI
from runtime.manifest import (
    SCHEMA,
    EmbeddingInfo,
    FileEntry,
    Manifest,
    ModelInfo,
    StateLayout,
    Target,
    digest,
    encode_manifest,
)
from runtime.plan import Bucket

VOCAB = 384
CONTEXT = 1024
SPECIALS = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_tokenizer() -> Tokenizer:
    """Byte-level BPE over a few sentences: every text goes through it without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        special_tokens=[AddedToken(text, special=True) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["the quick brown fox jumps over the lazy dog " * 9, "héllo wörld 漢字 🎉 " * 9]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def text_files() -> dict[str, bytes]:
    config = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    return {
        "tokenizer.json": toy_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
        "generation_config.json": json.dumps({"eos_token_id": [2]}).encode(),
    }


def write_artifact(
    parent: Path,
    *,
    template: str = TEMPLATE,
    slots: int = 64,
    embedding: EmbeddingInfo | None = None,
) -> Path:
    texts = text_files() | {"chat_template.jinja": template.encode()}
    files = {f"text/{name}": data for name, data in texts.items()}
    bucket = Bucket(name="mixed", tokens=512, seqs=slots, pages=CONTEXT // 16)
    files[plan_path(0, bucket.name)] = b"no plan: the null device runs none"
    files[weights_path(0)] = weights_file.header(())
    roles = {weights_path(0): "weights"}
    manifest = Manifest(
        schema=SCHEMA,
        tool="headstart test",
        versions={},
        name="toy",
        model=ModelInfo(
            name="toy",
            family="llama",
            architectures=("LlamaForCausalLM",),
            context=CONTEXT,
            vocab=VOCAB,
            dim=64,
            layers=2,
            parameters=1,
            eos_token_ids=(2,),
            bos_token_id=0,
            embedding=embedding,
        ),
        target=Target(kind="cpu", machine="x86_64", levels=(), abi=ABI),
        dtype="float32",
        quant={"scheme": "none"},
        kv_dtype="float32",
        ranks=1,
        config={},
        provenance={},
        spec={},
        source={},
        buckets=(bucket,),
        work_bytes=64,
        io_bytes=64,
        weights_bytes=0,
        edits=CONTEXT + 2048,
        max_seqs=slots,
        max_tokens=512,
        state=StateLayout(
            slots=slots, page_size=16, page_bytes=4096, pages_offset=4096, kv_dtype="float32"
        ),
        libraries=(),
        files=tuple(
            FileEntry(
                path=path,
                size=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                role=roles.get(path, "data"),
            )
            for path, data in sorted(files.items())
        ),
        tensors=((),),
        report={},
        accuracy={},
    )
    encoded = encode_manifest(manifest)
    root = parent / digest(encoded)
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    (root / "manifest.json").write_bytes(encoded)
    Artifact.open(root)
    return root
