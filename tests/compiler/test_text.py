"""Text files: the made-up tokenizer is exact and lossless, real ones are copied or converted,
templates and ids are checked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.errors import CompileError, DamagedCheckpoint
from compiler.hub import locate
from compiler.synthetic_tokenizer import synthetic_tokenizer
from compiler.text import Text, made_up_text, read_text
from conf.load import load
from conf.schema import CompileConfig
from runtime.text.chat import ChatTemplate
from runtime.text.tokenizer import Tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def load_text(text: Text) -> Tokenizer:
    loaded = Tokenizer.load(lambda name: text.files.get(name))
    assert loaded is not None
    return loaded


# --- made up --------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [260, 300, 1024, 1025, 32000])
def test_synthetic_vocabulary_is_exact(vocab: int) -> None:
    data = synthetic_tokenizer(vocab, {2: "<|end|>", vocab - 1: "<|start|>"})
    assert data is not None
    tokenizer = tokenizers.Tokenizer.from_buffer(data)
    table = tokenizer.get_vocab(with_added_tokens=True)
    assert sorted(table.values()) == list(range(vocab))
    assert table["<|end|>"] == 2 and table["<|start|>"] == vocab - 1
    assert tokenizer.encode("a<|end|>b").ids[1] == 2


def test_synthetic_tokenizer_needs_room_for_bytes_and_specials() -> None:
    assert synthetic_tokenizer(257, {0: "x"}) is not None
    assert synthetic_tokenizer(256, {0: "x"}) is None


def test_synthetic_tokenizer_is_the_same_everywhere() -> None:
    data = synthetic_tokenizer(2000, {0: "<|end|>"})
    assert data is not None
    assert hashlib.sha256(data).hexdigest() == GOLDEN


GOLDEN = "486eca7a1a8a3bddddbec1fab38692197884d67b6d27367186ffc6ae16f0a4a1"
SYNTHETIC = tokenizers.Tokenizer.from_buffer(synthetic_tokenizer(4096, {0: "<|end|>"}) or b"")


@settings(deadline=None)
@given(st.text())
def test_synthetic_round_trip(text: str) -> None:
    ids = SYNTHETIC.encode(text).ids
    if "<|end|>" not in text:
        assert SYNTHETIC.decode(ids, skip_special_tokens=False) == text


def test_synthetic_compresses_like_a_tokenizer() -> None:
    text = "the engine keeps every request of the batch in order and answers at once " * 10
    assert len(SYNTHETIC.encode(text).ids) < len(text) / 2


@pytest.mark.parametrize("name", ["smollm-135m", "llama3.2-1b", "qwen2-7b"])
def test_made_up_text_serves_a_named_shape(name: str) -> None:
    values = load(CompileConfig, "compile", [f"model={name}"]).config.model.config
    text = made_up_text(values, values["vocab_size"], None)
    tokenizer = load_text(text)
    assert tokenizer.backend.get_vocab_size() == values["vocab_size"]
    eos = values["eos_token_id"]
    assert text.eos_token_ids == tuple(eos if isinstance(eos, list) else [eos])
    assert tokenizer.backend.token_to_id("<|im_end|>") == text.eos_token_ids[0]
    template = ChatTemplate(text.files["chat_template.jinja"].decode(), {})
    prompt = template.render(MESSAGES)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert prompt.endswith("<|im_start|>assistant\n")
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids.count(text.eos_token_ids[0]) == 2


def test_a_tiny_vocabulary_gets_no_tokenizer() -> None:
    text = made_up_text({"eos_token_id": 2}, 128, None)
    assert set(text.files) == {"generation_config.json"} and text.eos_token_ids == (2,)


# --- from a checkpoint ----------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The text half of the tiny model, to be changed."""
    copy = tmp_path / "model"
    shutil.copytree(locate("package:tiny", None), copy)
    (copy / "model.safetensors").unlink()
    return copy


def edit(directory: Path, name: str, **changes: Any) -> None:
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def config_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


def read(directory: Path, template: str | None = None, vocab: int = 1024) -> Text:
    return read_text(directory, config_of(directory), vocab, template)


def test_tiny_encodes_as_transformers_does(directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer = load_text(read(directory))
    for text in ("Hello, world", "<|im_start|>user\nünïcode 🙂<|im_end|>", "  spaces\n\tand tabs "):
        assert tokenizer.encode(text) == reference(text).input_ids
    template = ChatTemplate(read(directory).files["chat_template.jinja"].decode(), {})
    expected = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert template.render(MESSAGES) == expected


def test_end_tokens_are_the_union_in_order(directory: Path) -> None:
    edit(directory, "config.json", eos_token_id=5)
    edit(directory, "generation_config.json", eos_token_id=[7, 5], temperature=0.6, top_p=0.9)
    text = read(directory)
    assert text.eos_token_ids == (5, 7, 2)  # 2: the tokenizer's own
    normal = json.loads(text.files["generation_config.json"])
    assert normal == {"eos_token_id": [5, 7, 2], "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize("token", [1024, "2", 1.5, -3])
def test_impossible_end_tokens_are_refused(directory: Path, token: Any) -> None:
    edit(directory, "config.json", eos_token_id=token)
    with pytest.raises(DamagedCheckpoint, match="eos_token_id"):
        read(directory)


def test_placeholders_are_no_tokens(directory: Path) -> None:
    edit(directory, "config.json", eos_token_id=None, bos_token_id=-1)
    edit(directory, "generation_config.json", eos_token_id=[2], bos_token_id=None)
    text = read(directory)
    assert text.eos_token_ids == (2,) and text.bos_token_id is None


def test_tokenizer_larger_than_the_model_is_refused(directory: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match=r"id 1023.*1000 embeddings"):
        read(directory, vocab=1000)


def test_special_tokens_of_old_files(directory: Path) -> None:
    edit(
        directory,
        "tokenizer_config.json",
        bos_token={"content": "<|endoftext|>", "lstrip": False},
        eos_token=None,
        add_bos_token=True,
        tokenizer_class="LlamaTokenizer",
    )
    edit(directory, "special_tokens_map.json", eos_token={"content": "<|im_end|>"})
    text = read(directory)
    normal = json.loads(text.files["tokenizer_config.json"])
    assert normal["bos_token"] == "<|endoftext|>" and normal["eos_token"] == "<|im_end|>"
    assert normal["add_bos_token"] is True
    assert load_text(text).encode("a")[0] == 0


def test_add_bos_flag_counts_only_for_classes_that_honour_it(directory: Path) -> None:
    edit(directory, "tokenizer_config.json", add_bos_token=True, tokenizer_class="Qwen2Tokenizer")
    assert json.loads(read(directory).files["tokenizer_config.json"])["add_bos_token"] is False


def test_eos_is_appended_where_the_class_honours_the_flag(directory: Path) -> None:
    """e5-mistral (Llama class) and gte-Qwen2 (a class of its own code) end every text with it."""
    edit(directory, "tokenizer_config.json", add_eos_token=True, eos_token="<|im_end|>")
    for changes, appended in (
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "Qwen2Tokenizer"}, False),
        ({"auto_map": {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", None]}}, True),
    ):
        edit(directory, "tokenizer_config.json", **changes)
        ids = load_text(read(directory)).encode("a")
        assert (ids[-1] == 2) is appended, changes


def test_padding_in_the_file_is_no_end_token(directory: Path) -> None:
    path = directory / "tokenizer.json"
    document = json.loads(path.read_text())
    document["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<|im_end|>",
    }
    path.write_text(json.dumps(document))
    text = read(directory)
    assert json.loads(text.files["tokenizer_config.json"])["add_eos_token"] is False
    assert len(load_text(text).encode("a")) == 1


def test_a_tokenizer_that_is_only_code_is_named(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    edit(directory, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tiktoken.T", None]})
    with pytest.raises(CompileError, match=r"is Python code .* put a tokenizer.json"):
        read(directory)


def test_without_a_tokenizer_token_ids_are_served(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    text = read(directory)
    assert set(text.files) == {"generation_config.json"} and text.eos_token_ids == (0, 2)


def test_broken_tokenizer_is_named(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match=r"tokenizer.json: cannot be read"):
        read(directory)


# --- templates ------------------------------------------------------------------------------------


def template_of(directory: Path, wanted: str | None = None) -> str | None:
    source = read(directory, wanted).files.get("chat_template.jinja")
    return source.decode() if source else None


def test_template_sources_in_order(directory: Path, tmp_path: Path) -> None:
    own = (directory / "chat_template.jinja").read_text()
    edit(directory, "tokenizer_config.json", chat_template="from config")
    assert template_of(directory) == own
    (directory / "chat_template.jinja").unlink()
    assert template_of(directory) == "from config"
    named = [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]
    edit(directory, "tokenizer_config.json", chat_template=named)
    assert template_of(directory) == "d" and template_of(directory, "rag") == "r"
    assert template_of(directory, "chatml") == own
    (tmp_path / "mine.jinja").write_text("mine")
    assert template_of(directory, str(tmp_path / "mine.jinja")) == "mine"
    edit(directory, "tokenizer_config.json", chat_template=None)
    assert template_of(directory) is None


def test_wrong_templates_are_refused(directory: Path) -> None:
    with pytest.raises(CompileError, match=r"chat_template=chatlm.*chatml"):
        read(directory, "chatlm")
    (directory / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DamagedCheckpoint, match="line 1"):
        read(directory)


# --- conversion -----------------------------------------------------------------------------------


def test_sentencepiece_is_converted(directory: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (directory / "tokenizer.json").unlink()
    (directory / "chat_template.jinja").unlink()
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    sentences = iter([f"{a} {b} {c}" for a in words for b in words for c in words])
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=file,
            vocab_size=330,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "add_bos_token": True,
            }
        )
    )
    edit(directory, "config.json", eos_token_id=2, bos_token_id=1)
    text = read(directory, vocab=330)
    tokenizer = load_text(text)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    for sample in ("one two nine", "three zebra", "ünïcode 🙂"):
        assert tokenizer.encode(sample) == [1, *reference.encode(sample)]
        assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_a_tokenizer_nobody_can_convert_is_named(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(CompileError, match="cannot be converted"):
        read(directory)
