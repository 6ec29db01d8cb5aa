"""Importing this module registers every quantization scheme."""

from compiler.quantize import int4, int8

__all__ = ["int4", "int8"]
