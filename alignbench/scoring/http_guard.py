"""What stands between the scorer service and whoever reaches its port: who may ask, how much, and for how long.

Web pages must not use a service that runs beside the browser. A page of another site can send simple requests anywhere, so
that scoring takes a content type for which a browser asks first. A page whose own name is made to resolve to this machine
(DNS rebinding) gives that name as Host, so that only names of this machine are answered; an address cannot be rebound.

Needs starlette and uvicorn.
"""

import asyncio
import hmac
import ipaddress
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HEADER_SECONDS = 10.0
"""How long a client may take from its connection, or from the first byte of a later request, to the end of the header."""
BODY_SECONDS, BODY_RATE = 10.0, 2**16
"""A body may take BODY_SECONDS, and a second more for each BODY_RATE bytes that have come."""
ANSWER_SECONDS = 10.0
"""How long a client may leave an answer unread."""
DRAIN_SECONDS = 5.0
"""How long the body of a refused request is read and dropped: a client that is still sending it would lose the answer."""
MAX_CONNECTIONS = 512


class Refusal(Exception):  # noqa: N818
    """A request is not answered.

    Attributes:
        status: the HTTP status.
        sentence: what the client is told.
    """

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> JSONResponse:
        return _Refused({"error": self.sentence}, self.status, {"connection": "close", **self.headers})


class _Refused(JSONResponse):
    """An answer that can come before the request's body has. The client has all of it while the body is still dropped."""

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})


def guarded(app: "ASGIApp", hosts: Collection[str], authorization: str | None) -> "ASGIApp":
    """The application for those who may use it.

    Args:
        hosts: names of this machine, in lower case; its addresses need not be among them.
        authorization: the Authorization header that each request must have; None for no such demand.
    """

    async def guard(scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "http":
            try:
                _check_client(Headers(scope=scope), hosts, authorization)
            except Refusal as refusal:
                await refusal.response()(scope, receive, send)
                return
        await app(scope, receive, send)

    return guard


def check_body(headers: Headers, max_bytes: int) -> None:
    """Raises Refusal for a body that is not JSON, or that is announced to be too large."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the request must have the header Content-Type: application/json")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)


async def read_body(request: Request, max_bytes: int) -> bytearray:
    """The body of a request; raises Refusal where it is too large, or comes too slowly."""
    began, body = asyncio.get_running_loop().time(), bytearray()
    try:
        async with asyncio.timeout_at(began + BODY_SECONDS) as deadline:
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
                deadline.reschedule(began + BODY_SECONDS + len(body) / BODY_RATE)
    except TimeoutError:
        raise Refusal(408, "the request's body came too slowly") from None
    return body


class Queue:
    """Requests that wait for one another.

    Args:
        length: how many may wait beside the one that is being answered; further ones are refused.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.inside = 0
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place in the queue, to be taken before the body is read; raises Refusal where there is none."""
        if self.inside > self.length:
            raise Refusal(503, f"{self.length} requests are waiting already; ask again later", retry_after="1")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Entered by one at a time, in order of arrival."""
        async with self._turn:
            yield


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which by itself waits for ever for the end of a header and for an answer to be read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is told whenever the client does not keep up
        if len(self.connections) > most_connections():
            transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            transport.close()
        self._watch_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._header_timer, self._answer_timer):
            if timer:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer_timer:
            self._answer_timer.cancel()

    def _watch_header(self) -> None:
        """Begins to wait for the end of a header, unless a request is being answered."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        elif not idle and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def uvicorn_options() -> dict[str, Any]:
    """How uvicorn must be run for all of this to hold."""
    return {"http": GuardedProtocol, "ws": "none", "proxy_headers": False, "server_header": False}


def most_connections() -> int:
    """Connections at a time: half of the files that this process may open, so that the scorer can open its own."""
    try:
        import resource
    except ImportError:  # not on POSIX
        return MAX_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


def _check_client(headers: Headers, hosts: Collection[str], authorization: str | None) -> None:
    host = headers.get("host", "")
    if not _is_ours(host, hosts):
        raise Refusal(403, f"this service is not called {host[:200]!r}; serve-scorer --allow-host NAME adds a name")
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        raise Refusal(403, f"web pages of {origin[:200]!r} may not use this service")
    given = headers.get("authorization", "").encode("latin-1")
    if authorization is not None and not hmac.compare_digest(given, authorization.encode("latin-1")):
        wrong = "not this service's" if given else "missing"
        raise Refusal(401, f"the token is {wrong}", www_authenticate="Bearer")


def _is_ours(host: str, hosts: Collection[str]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if set("@/?#\\") & set(host):
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.rstrip(".") in hosts
    return True


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(413, f"the request is larger than {max_bytes} bytes; ask for fewer images")
