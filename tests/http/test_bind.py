"""The address is taken before anything is loaded; what is wrong with it is one line."""

from __future__ import annotations

import pytest

from runtime.errors import Busy, UsageError
from runtime.serve import bind


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_a_host_that_is_not_this_machine_is_a_usage_error(host: str) -> None:
    with pytest.raises(UsageError, match=f"host={host}: .*address of this machine"):
        bind(host, 0)


def test_a_port_that_is_taken_is_busy() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(Busy, match="port="):
        bind("127.0.0.1", first.getsockname()[1])
