"""The server around the application: there before the model is, and until the last answer has been written.

`Door` stands in front of the application. It answers 503 while the model is loaded, and again once the server is to
end, so that whoever spreads requests over servers sends no more here; answers that are being written go on.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOL_SOCKET, socket
from typing import Any

import uvicorn
from starlette.responses import JSONResponse

from nanochat.errors import UserError
from nanochat.web.limits import Limits, Receive, Scope, Send, guarded_protocol
from nanochat.web.schema import ApiError

CLOSED = {"loading": "the model is being loaded; try again soon", "draining": "the server is shutting down"}


class Door:
    """An ASGI application that is another one while it is open."""

    def __init__(self) -> None:
        self.app: Any = None
        self.closed = "loading"  # why it is, or ""

    def open(self, app: Any) -> None:
        self.app, self.closed = app, ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.closed:
            return await self.app(scope, receive, send)
        refusal = ApiError(503, CLOSED[self.closed], "server_error", code=self.closed)
        body = dict(status=self.closed) if scope["path"] == "/health" else refusal.body
        await JSONResponse(body, 503, {"retry-after": "1", "connection": "close"})(scope, receive, send)


def address(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket:
    """A socket that takes connections. Raises UserError when port or address cannot be had."""
    at = None
    try:
        at = socket(AF_INET6 if ":" in host else AF_INET)  # refused where the system has no IPv6
        at.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        at.bind((host, port))
        at.listen(2048)
    except (OSError, UnicodeError, TypeError) as problem:  # the last two of a name that is none
        if at:
            at.close()
        why = getattr(problem, "strerror", None) or problem
        raise UserError(f"cannot listen on {address(host)}:{port}: {why}; try another --port or --host") from None
    return at


@contextmanager
def listening(door: Door, limits: Limits, at: socket) -> Iterator[threading.Thread]:
    """Serves in a thread while the block lasts; then takes no more, and ends when what is being sent has left."""
    config = uvicorn.Config(
        door, http=guarded_protocol(limits), log_level="error", timeout_graceful_shutdown=5, timeout_keep_alive=15,
        h11_max_incomplete_event_size=32 << 10, server_header=False, ws="none", lifespan="off",
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[at])), name="server", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield thread
    finally:
        server.should_exit = True
        thread.join()


def until_told_to_end(thread: threading.Thread) -> None:
    """Returns after SIGINT or SIGTERM, or when the server's thread ends by itself. A second signal is deadly again."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    while not seen and thread.is_alive():
        time.sleep(0.1)
    for number, handler in before.items():
        signal.signal(number, handler)
