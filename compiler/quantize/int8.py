"""int8, weight only."""

from compiler.quantize.scheme import Scheme, register

INT8 = register(Scheme(name="int8", low=-127, high=127))
