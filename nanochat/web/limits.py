"""What keeps a client from hurting the others: sizes, deadlines, hosts, keys.

`Guard` is an ASGI middleware around the app; `guarded_protocol` a protocol for uvicorn, which by itself waits for ever
for a request's headers. On localhost without a key, a web page elsewhere must not reach the server through the reader's
browser: so the Host must be one of ours (against DNS rebinding), and a body must be declared as JSON (a form on another
site cannot do that without asking first, and no other origin is allowed but one that was named).
"""

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import anyio
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.errors import UserError, is_number
from nanochat.web.schema import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
DRAINED = 4  # times the longest body: so much is read before it is refused; a client that still writes hears nothing
OPEN = ("/", "/health", "/favicon.ico")  # what needs no key: the page itself, and whether we live


EVERYWHERE = ("0.0.0.0", "::")  # addresses that stand for all


@dataclass(frozen=True)
class Limits:
    hosts: frozenset[str]  # names the server answers to; empty: any
    api_key: str = ""
    origin: str = ""  # of one other page that may ask, as a browser writes it: https://example.org
    body_bytes: int = 2 << 20
    body_seconds: float = 10.0
    header_seconds: float = 10.0
    connections: int = 1024


def called(host: str, more: str) -> frozenset[str]:
    """The names of a server that listens on `host`, and more, comma-separated; empty: any. Raises UserError."""
    names = {name.strip().lower() for name in more.split(",")} - {""}
    if wrong := next((name for name in names if not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:]+", name)), None):
        raise UserError(f"--allow-host: {wrong!r} is no host name; it stands alone, without a port or http://")
    return frozenset() if host in EVERYWHERE else frozenset({host.lower(), "localhost", "127.0.0.1", "::1", *names})


def checked_origin(origin: str) -> str:
    """As a browser writes it. Raises UserError for anything else."""
    if origin and not re.fullmatch(r"https?://[a-z0-9._-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?", origin.lower()):
        raise UserError(f"--allow-origin is {origin!r}, wanted one page's origin, such as https://example.org:8080")
    return origin.lower()


class Guard:
    def __init__(self, app: Any, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            headers = {key.decode("latin1").lower(): value.decode("latin1") for key, value in scope["headers"]}
            self.check(scope["method"], scope["path"], headers)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                body = await self.body(receive, headers)
                receive = once(body, receive)
        except ApiError as error:
            response = JSONResponse(error.body, error.status, {**error.headers, "connection": "close"})
            return await response(scope, receive, send)
        await self.app(scope, receive, send)

    def check(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Raises ApiError for a request that is refused by its headers."""
        host = headers.get("host", "").rsplit("@", 1)[-1]
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self.limits.hosts and name.lower() not in self.limits.hosts:
            raise ApiError(400, f"this server is not {name[:100]!r}; give --allow-host to serve it under another name")
        if self.limits.api_key and path not in OPEN and not path.startswith("/static/"):
            if not right_key(headers.get("authorization", ""), self.limits.api_key):
                raise ApiError(401, "wrong API key", "authentication_error", code="invalid_api_key")
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be declared as application/json")
        if (coding := headers.get("content-encoding", "").strip().lower()) not in ("", "identity"):
            raise ApiError(415, f"the body is sent as {coding[:100]!r}; it must be plain JSON, without compression")

    async def body(self, receive: Receive, headers: dict[str, str]) -> bytes:
        """The whole body. Raises ApiError when it is too long or too slow."""
        limits = self.limits
        too_long = ApiError(413, f"the body is larger than {limits.body_bytes:,} bytes")
        length = headers.get("content-length", "0")
        if not is_number(length) or int(length) > DRAINED * limits.body_bytes:
            raise too_long
        chunks, size = [], 0
        try:
            with anyio.fail_after(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size <= limits.body_bytes:
                        chunks.append(chunk)
                    last = not message.get("more_body")
                    if size > limits.body_bytes and (last or size > DRAINED * limits.body_bytes):
                        raise too_long
                    if last:
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {limits.body_seconds:g} seconds") from None


def right_key(authorization: str, key: str) -> bool:
    """Of a header, decoded as Latin-1. Clients send a key beyond ASCII as UTF-8, browsers as Latin-1."""
    scheme, _, given = authorization.partition(" ")
    forms = ["utf-8", *(["latin1"] if max(key) <= "\xff" else [])]
    right = [hmac.compare_digest(given.strip().encode("latin1"), key.encode(form)) for form in forms]
    return scheme.lower() == "bearer" and any(right)


def once(body: bytes, receive: Receive) -> Receive:
    """A receive that gives a body that was read already, then what comes after it."""
    given = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def guarded_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol with a deadline for headers and a bound on connections."""
    opened = 0

    class Guarded(H11Protocol):
        deadline: asyncio.TimerHandle | None = None
        counted = False

        def connection_made(self, transport: Any) -> None:
            nonlocal opened
            super().connection_made(transport)
            opened, self.counted = opened + 1, True
            if opened > limits.connections:
                self.refuse(ApiError(503, "too many connections", "server_error", headers={"retry-after": "1"}))
            else:
                self.wait()

        def connection_lost(self, exc: Exception | None) -> None:
            nonlocal opened
            if self.counted:
                opened, self.counted = opened - 1, False
            self.ready()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self.ready()  # a request's headers are here
            elif before is None or before.response_complete:
                self.wait()  # some of the next one's

        def send_400_response(self, msg: str) -> None:
            self.refuse(ApiError(400, "this is no HTTP that we understand"))

        def refuse(self, error: ApiError) -> None:
            """Answers before there is a request, and closes."""
            answer = JSONResponse(error.body, error.status, {**error.headers, "connection": "close"})
            head = b"".join(b"%s: %s\r\n" % pair for pair in answer.raw_headers)
            phrase = HTTPStatus(error.status).phrase.encode()
            self.transport.write(b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (error.status, phrase, head, answer.body))
            self.transport.close()

        def wait(self) -> None:
            if self.deadline is None:
                self.deadline = self.loop.call_later(limits.header_seconds, self.transport.close)

        def ready(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

    return Guarded
