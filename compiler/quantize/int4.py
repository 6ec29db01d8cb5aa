"""int4, weight only; codes travel as int8 in [-8, 7] until they are packed."""

from compiler.quantize.scheme import Scheme, register

INT4 = register(Scheme(name="int4", low=-8, high=7))
