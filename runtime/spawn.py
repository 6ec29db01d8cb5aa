"""Starting the engine process: a child joined to us by one inherited socket.

Comes in: the worker's arguments. Goes out: `EngineProcess`. Called first thing by serve.py, so that
the engine starts while everything else is still being imported: nothing heavy may be imported here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys


class EngineProcess:
    """The child and our end of its socket; closing the socket tells the child to end."""

    def __init__(self, arguments: list[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            fd = theirs.fileno()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "runtime.core.worker", str(fd), *arguments],
                pass_fds=(fd,),
                stdin=subprocess.DEVNULL,
                # A terminal's ^C reaches the whole group; only we decide when the engine ends.
                start_new_session=True,
            )
        ours.setblocking(False)
        self.socket = ours
        self.pid = self._child.pid

    def kill(self) -> None:
        if self._child.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._child.kill()

    def wait(self, timeout: float) -> bool:
        """True when it has ended."""
        try:
            self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True
