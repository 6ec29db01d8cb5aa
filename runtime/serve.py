"""`python -m runtime.serve artifact=…`: the HTTP process.

Comes in: ServeConfig. Goes out: an exit code, after a life of serving. The engine process is
started before anything slow is imported here, so that weights load while aiohttp and the tokenizer
do.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Mapping

from conf.load import run
from conf.schema import ServeConfig
from runtime.errors import Busy, HeadstartError, UsageError
from runtime.spawn import EngineProcess


def main(config: ServeConfig, sources: Mapping[str, str]) -> int:
    listener = bind(config.host, config.port)
    engine = EngineProcess(worker_arguments(config))
    try:
        # Imported only now: the engine is already loading.
        from runtime.http.lifetime import serve

        return serve(config, listener, engine, lambda: EngineProcess(worker_arguments(config)))
    except HeadstartError:
        engine.kill()
        raise


def bind(host: str, port: int) -> socket.socket:
    """Taken before anything is loaded, so that a busy port costs nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1)  # without it, two servers could both bind
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(
                f"host={host}: {error.strerror}; give an address of this machine"
            ) from None
        raise Busy(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with port=…"
        ) from None
    return listener


def worker_arguments(config: ServeConfig) -> list[str]:
    import msgspec

    from runtime.core.options import engine_options

    return [msgspec.json.encode(engine_options(config)).decode()]


if __name__ == "__main__":
    sys.exit(run(ServeConfig, "serve", main))
