"""int4, weight only; codes travel as int8 in [-8, 7] until they are packed."""

from compiler.quantize.scheme import GroupScheme, register

INT4 = register(GroupScheme(name="int4", low=-8, high=7))
