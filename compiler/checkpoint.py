"""A Hugging Face directory as names -> lazy tensor views, plus a reader of its config.json that
records what was read.

Comes in: a local directory (`compiler.hub` fetches remote ones). Every structural claim of the
files is checked on open; tensors are mapped, copied by nobody until used. Called by
`compiler.importer`.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from compiler.errors import CompileError, DamagedCheckpoint
from compiler.prequantized import stand_ins
from compiler.safetensors_file import Entry, read_entries

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODE_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}  # of quantized tensors
REQUIRED: Any = object()


MOST_LAYERS = 10_000


class ConfigReader:
    """A config.json that knows which of its keys were asked for. `null` counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._values = dict(values)
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def translated(self, spelling: Mapping[str, str], defaults: Mapping[str, Any]) -> ConfigReader:
        """This config with a family's own keys under their usual names (`spelling`: own -> usual;
        "section.key" is taken out of its section), and what its class assumes where a key is absent
        or null."""
        values, assumed = dict(self._values), set[str]()
        for own in spelling:
            if section := own.rpartition(".")[0]:
                values[section] = dict(self.value(section, dict, {}))
        for own, usual in spelling.items():
            section, _, key = own.rpartition(".")
            holder = values[section] if section else values
            if key not in holder:
                continue
            value = holder.pop(key)
            if values.get(usual) is None:
                values[usual] = value
            if values[usual] != value:
                raise DamagedCheckpoint(
                    f"{self.where}: {own} is {value!r} and {usual} is {values[usual]!r}; "
                    "they name the same thing"
                )
        for key, value in defaults.items():
            if values.get(key) is None:
                values[key] = value
                assumed.add(key)
        reader = ConfigReader(values, self.where)
        reader._read |= assumed
        return reader

    def has(self, key: str) -> bool:
        self._read.add(key)
        return self._values.get(key) is not None

    def value(self, key: str, kind: type | tuple[type, ...], default: Any = REQUIRED) -> Any:
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is REQUIRED:
                raise DamagedCheckpoint(f"{self.where}: key {key!r} is missing")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and type(value) is int:
            value = float(value)
        untold = isinstance(value, bool) and not {bool, object} & set(kinds)  # True is no integer
        if not isinstance(value, kinds) or untold:
            expected = " or ".join(k.__name__ for k in kinds)
            raise DamagedCheckpoint(f"{self.where}: {key} is {value!r}, expected {expected}")
        return value

    def integer(self, key: str, default: Any = REQUIRED) -> int:
        value = self.value(key, int, default)
        if value is not default and value <= 0:
            raise DamagedCheckpoint(f"{self.where}: {key} is {value}, expected a positive number")
        if key == "num_hidden_layers" and value > MOST_LAYERS:  # each becomes an object of its own
            raise DamagedCheckpoint(
                f"{self.where}: {key} is {value}, expected at most {MOST_LAYERS}"
            )
        return cast(int, value)

    def number(self, key: str, default: Any = REQUIRED) -> float:
        value = self.value(key, float, default)
        if isinstance(value, float) and not math.isfinite(value):
            raise DamagedCheckpoint(f"{self.where}: {key} is {value}, expected a finite number")
        return cast(float, value)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        return cast(bool, self.value(key, bool, default))

    def text(self, key: str, default: Any = REQUIRED) -> str:
        return cast(str, self.value(key, str, default))

    def section(self, key: str) -> ConfigReader:
        """A nested object as its own reader; its keys must be read like the others."""
        return ConfigReader(self.value(key, dict), f"{self.where}: {key}")

    def require(self, key: str, accepted: tuple[Any, ...], default: Any) -> None:
        """The key has one of the values we implement."""
        value = self.value(key, object, default)
        if value not in accepted:
            choices = " or ".join(map(repr, accepted))
            raise CompileError(
                f"{self.where}: {key} {value!r} is not supported; supported: {choices}"
            )

    def finish(self, ignorable: frozenset[str] = frozenset()) -> None:
        """Raise if a key was neither read nor is known to be irrelevant."""
        left = sorted(k for k in self._values if k not in self._read and k not in ignorable)
        if left:
            raise CompileError(
                f"{self.where}: key {left[0]!r} ({_short(self._values[left[0]])}) is not understood"
                + (f", nor are {', '.join(left[1:])}" if left[1:] else "")
                + "; it may change the model, so it is not ignored"
            )


class Checkpoint:
    """`entries` maps every tensor to its dtype, shape and place; `tensor` gives a view of the
    mapped file, or the bfloat16 numbers that quantized tensors stand for.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], entries: dict[str, tuple[str, Entry]]
    ) -> None:
        self.path = path
        self.config = config
        self._entries = entries
        self._maps: dict[str, np.ndarray] = {}
        self._stand_ins = stand_ins({name: entry for name, (_, entry) in entries.items()}, config)
        self._consumed = {part for one in self._stand_ins.values() for part in one.parts}

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        path = Path(path)
        if not path.is_dir():
            raise DamagedCheckpoint(f"{path}: is not a directory; give one that holds config.json")
        config = read_json(path / "config.json")
        if (path / SINGLE).is_file():
            entries = {name: (SINGLE, e) for name, e in read_entries(path / SINGLE).items()}
        elif (path / INDEX).is_file():
            entries = _read_index(path)
        else:
            raise _no_weights(path)
        return cls(path, config, entries)

    def __contains__(self, name: str) -> bool:
        stored = name in self._entries and name not in self._consumed
        return stored or name in self._stand_ins

    def names(self) -> list[str]:
        return [n for n in self._entries if n not in self._consumed] + list(self._stand_ins)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._stand_ins:
            return self._stand_ins[name].shape
        return self._entry(name)[1].shape

    def dtype(self) -> str:
        """What the weights are stored as: the dtype of most bytes (`float32`, `bfloat16` or
        `float16`).
        """
        sizes: dict[str, int] = {}
        for name, (_, entry) in self._entries.items():
            dtype = "BF16" if name in self._consumed else entry.dtype
            sizes[dtype] = sizes.get(dtype, 0) + entry.end - entry.start
        top = max(sorted(sizes), key=lambda d: sizes[d])
        return str(TORCH_DTYPES.get(top, top)).removeprefix("torch.")

    def in_bfloat16(self, name: str) -> bool:
        """Whether `tensor` is bfloat16."""
        return name in self._stand_ins or self._entry(name)[1].dtype == "BF16"

    def tensor(self, name: str) -> torch.Tensor:
        if name in self._stand_ins:
            return self._stand_ins[name].read(self._stored)
        return self._stored(name)

    def _stored(self, name: str) -> torch.Tensor:
        file, entry = self._entry(name)
        dtypes = TORCH_DTYPES | (CODE_DTYPES if name in self._consumed else {})
        if entry.dtype not in dtypes:
            raise CompileError(
                f"{self.path / file}: tensor {name} is {entry.dtype}; "
                f"readable: {', '.join(TORCH_DTYPES)} (a quantized checkpoint? use the original)"
            )
        if file not in self._maps:
            with (self.path / file).open("rb") as f:
                # Copy-on-write: torch wants a writable buffer, the file stays as it is.
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[file] = np.frombuffer(mapped, np.uint8)
        data = self._maps[file][entry.start : entry.end]
        if entry.start % 4:  # a foreign writer's odd header length: views need alignment
            data = data.copy()
        return torch.from_numpy(data).view(dtypes[entry.dtype]).view(entry.shape)

    def digests(self) -> dict[str, str]:
        """SHA-256 of config.json and every weight file, by file name."""
        names = sorted({"config.json", *(file for file, _ in self._entries.values())})
        result = {}
        for name in names:
            with (self.path / name).open("rb") as f:
                result[name] = hashlib.file_digest(f, "sha256").hexdigest()
        return result

    def _entry(self, name: str) -> tuple[str, Entry]:
        if name not in self._entries:
            raise DamagedCheckpoint(f"{self.path}: tensor {name} is missing")
        return self._entries[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{path}: holds {_short(value)}, expected a JSON object")
    return value


def read_json_value(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: is missing; give a complete model directory") from None
    except (ValueError, RecursionError) as e:
        raise DamagedCheckpoint(f"{path}: is not valid JSON ({e})") from None


def _read_index(path: Path) -> dict[str, tuple[str, Entry]]:
    """Shards of an index: each tensor is where the index says and nowhere else.
    (`metadata.total_size` is not checked: published files count tied tensors twice.)
    """
    index = path / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedCheckpoint(f"{index}: has no weight_map")
    entries: dict[str, tuple[str, Entry]] = {}
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise DamagedCheckpoint(f"{index}: {file!r} is not the name of a shard")
        if not (path / file).is_file():
            raise DamagedCheckpoint(f"{path / file}: shard is missing; download it")
        for name, entry in read_entries(path / file).items():
            if weight_map.get(name) != file:
                raise DamagedCheckpoint(
                    f"{path / file}: holds tensor {name}, which the index places in "
                    f"{weight_map.get(name, 'no shard')}"
                )
            entries[name] = (file, entry)
    for name, file in weight_map.items():
        if name not in entries:
            raise DamagedCheckpoint(f"{path / str(file)}: tensor {name} of the index is not in it")
    return entries


def _no_weights(path: Path) -> Exception:
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        return CompileError(
            f"{path / pickles[0]}: pickle checkpoints can run code and are not read; convert once "
            "in a sandbox: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(out, "
            "safe_serialization=True)"
        )
    return DamagedCheckpoint(f"{path}: holds neither {SINGLE} nor {INDEX}")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
