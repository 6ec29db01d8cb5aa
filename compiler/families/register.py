"""Importing this module registers every family."""

from compiler.families import bert, llama, mistral, qwen

__all__ = ["bert", "llama", "mistral", "qwen"]
