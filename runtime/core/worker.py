"""The engine process: `python -m runtime.core.worker FD OPTIONS`, FD our end of a socket pair,
OPTIONS EngineOptions as JSON.

Started by `runtime.spawn`. This file only makes sure that the process cannot outlive its parent,
then hands over to process.py.
"""

from __future__ import annotations

import os
import select
import sys

from runtime.lifetime import die_with_parent


def end_if_orphan(arguments: list[str]) -> None:
    """A parent that went before the kernel was asked to tell us: its end of the socket is gone."""
    if arguments and arguments[0].isdigit():
        poll = select.poll()
        poll.register(int(arguments[0]), select.POLLHUP)
        if any(event & select.POLLHUP for _, event in poll.poll(0)):
            os._exit(0)


if __name__ == "__main__":
    die_with_parent()  # before anything slow, the next import included
    end_if_orphan(sys.argv[1:])
    from runtime.core.process import main

    main(sys.argv[1:])
