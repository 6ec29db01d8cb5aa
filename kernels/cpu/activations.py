"""Names of activations in op attributes, and their codes in the native kernels (vec.h)."""

from __future__ import annotations

from collections.abc import Mapping

ACTIVATION_CODES: Mapping[str, int] = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}
SILU_CLAMPED = 6  # of experts alone; the up half is clamped too
# Activations of a gate, and what is applied to it.
GATED: Mapping[str, str] = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
