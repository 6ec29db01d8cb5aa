"""int8, weight only."""

from compiler.quantize.scheme import GroupScheme, register

INT8 = register(GroupScheme(name="int8", low=-127, high=127))
