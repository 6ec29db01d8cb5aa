"""Script: any tokenizer transformers can read -> tokenizer.json. Run as its own process by
`compiler.text`, because transformers probes for a distribution named like our `kernels` package;
it imports nothing of ours.

Usage: python -P convert_tokenizer.py <checkpoint directory> <output directory>
"""

from __future__ import annotations

import sys

from transformers import AutoTokenizer


def main(source: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        source, local_files_only=True, trust_remote_code=False
    )
    if not tokenizer.is_fast:
        raise SystemExit(f"{type(tokenizer).__name__} has no fast equivalent")
    tokenizer.backend_tokenizer.save(f"{out}/tokenizer.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
