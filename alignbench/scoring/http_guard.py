"""Protects the scorer service: which clients it answers, how large their requests may be, and how long they may take.

Web pages must not use a service that runs on the same machine as the browser. A page of another site can send simple requests
anywhere, so scoring requires a content type for which a browser asks for permission first. A page whose name is made to resolve
to this machine (DNS rebinding) sends that name as Host, so only names of this machine are answered; an IP address cannot be
rebound.

This module needs starlette and uvicorn.
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
"""How many seconds a client may take from its connection, or from the first byte of a later request, to the end of the
header."""
BODY_SECONDS, BODY_RATE = 10.0, 2**16
"""How many seconds a body may take, and after how many received bytes it gets another second."""
ANSWER_SECONDS = 10.0
"""How many seconds a client may leave a response unread."""
DRAIN_SECONDS = 5.0
"""For how many seconds the body of a refused request is read and dropped. Otherwise a client that is still sending it would
lose the response."""
MAX_CONNECTIONS = 512
"""The largest number of connections."""


class Refusal(Exception):  # noqa: N818
    """A request is refused.

    Attributes:
        status: the HTTP status of the response.
        sentence: the error message of the response.
        headers: further headers of the response.
    """

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> JSONResponse:
        """Makes the response, after which the connection is closed."""
        return _RefusalResponse({"error": self.sentence}, self.status, {"connection": "close", **self.headers})


class _RefusalResponse(JSONResponse):
    """A response that can be sent before the request's body has arrived. The client gets all of it while the body is
    dropped."""

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})


def guarded(app: "ASGIApp", hosts: Collection[str], authorization: str | None) -> "ASGIApp":
    """Wraps an application so that it refuses clients that may not use it.

    Args:
        app: the ASGI application.
        hosts: the names of this machine, in lower case; its addresses need not be among them.
        authorization: the Authorization header that each request must have; None if none is required.
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
    """Raises Refusal if the headers announce a body that is not JSON or that is too large."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the request must have the header Content-Type: application/json")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)


async def read_body(request: Request, max_bytes: int) -> bytearray:
    """Reads the body of a request; raises Refusal if it is larger than `max_bytes` or arrives too slowly."""
    began, body = asyncio.get_running_loop().time(), bytearray()
    try:
        async with asyncio.timeout_at(began + BODY_SECONDS) as deadline:
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
                deadline.reschedule(began + BODY_SECONDS + len(body) / BODY_RATE)
    except TimeoutError:
        raise Refusal(408, "the request's body arrived too slowly") from None
    return body


class Queue:
    """A queue of requests, of which one is processed at a time.

    Args:
        length: how many requests may wait besides the one that is being processed; further ones are refused.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.inside = 0
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Takes a place in the queue, before the body is read; raises Refusal if there is none."""
        if self.inside > self.length:
            raise Refusal(503, f"{self.length} requests are already waiting; try again later", retry_after="1")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for this request's turn, in the order of arrival."""
        async with self._turn:
            yield


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with timeouts for headers and for unread responses, which uvicorn itself would wait for forever."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is called whenever the client does not keep up
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
        """Starts the timer for the end of a header, unless a request is being processed."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        elif not idle and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def uvicorn_options() -> dict[str, Any]:
    """Returns the options that uvicorn needs for this protection to work."""
    return {"http": GuardedProtocol, "ws": "none", "proxy_headers": False, "server_header": False}


def most_connections() -> int:
    """Computes the largest number of connections: half of the files that this process may open, so the scorer can open
    others."""
    try:
        import resource
    except ImportError:  # not on POSIX
        return MAX_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


def _check_client(headers: Headers, hosts: Collection[str], authorization: str | None) -> None:
    """Raises Refusal for a wrong host, for a web page of another site, and for a missing or wrong token."""
    host = headers.get("host", "")
    if not _is_ours(host, hosts):
        raise Refusal(403, f"this service is not called {host[:200]!r}; serve-scorer --allow-host NAME adds a name")
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        raise Refusal(403, f"web pages of {origin[:200]!r} may not use this service")
    sent = headers.get("authorization", "").encode("latin-1")
    if authorization is not None and not hmac.compare_digest(sent, authorization.encode("latin-1")):
        problem = "not this service's" if sent else "missing"
        raise Refusal(401, f"the token is {problem}", www_authenticate="Bearer")


def _is_ours(host: str, hosts: Collection[str]) -> bool:
    """Tells whether a Host header is an IP address or one of this machine's names."""
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
    return Refusal(413, f"the request is larger than {max_bytes} bytes; send fewer images")
