"""The interpreter's fp8 against torch's: every code, every border between codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.cuda.interpret import fp8_values, to_fp8


@pytest.mark.parametrize(
    ("mantissa", "bias", "dtype", "largest"),
    [(3, 7, torch.float8_e4m3fn, 448.0), (2, 15, torch.float8_e5m2, 57344.0)],
)
def test_fp8_is_that_of_torch(mantissa: int, bias: int, dtype: torch.dtype, largest: float) -> None:
    values = fp8_values(mantissa, bias)
    want = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    np.testing.assert_array_equal(values, want)

    finite = np.unique(values[np.isfinite(values)])
    borders = (finite[:-1] + finite[1:]) / 2
    x = np.concatenate([finite, borders, np.nextafter(borders, 1e9), np.nextafter(borders, -1e9)])
    x = np.concatenate([x, [largest * 1.5, -1e30, np.inf, -np.inf]]).astype(np.float32)
    rounded = torch.from_numpy(x).clamp(-largest, largest).to(dtype).float().numpy()
    np.testing.assert_array_equal(values[to_fp8(x, values)], rounded)
    assert np.isnan(values[to_fp8(np.float32([np.nan]), values)]).all()
