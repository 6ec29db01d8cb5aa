"""Importing this module registers every family."""

from compiler.families import llama, mistral, qwen

__all__ = ["llama", "mistral", "qwen"]
