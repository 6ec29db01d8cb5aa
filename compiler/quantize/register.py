"""Importing this module registers every quantization scheme."""

from compiler.quantize import fp8, int4, int8

__all__ = ["fp8", "int4", "int8"]
