"""remote: a scorer in another process or on another machine, where `serve-scorer` offers it over HTTP.

Images are sent as PNG and everything else as JSON (see `alignbench.scoring.serving`). A server that cannot be reached or that
fails stops the run with one sentence and a checkpoint; a failure never becomes a score.

The server is trusted with nothing but its scores: a whole request has one deadline, the size of a response is limited, and
redirects are not followed. A proxy is never used for this machine. If the environment sets a proxy for another machine, error
messages name it. TLS certificates are verified.

A service that requires a token gets it from the file in `token_file`, or else from the variable ALIGNBENCH_SCORER_TOKEN. The
token is read for each request and is not written into any record; `~/.netrc` is not read.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

import numpy as np
import requests
from pydantic import Field
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError

from alignbench import RunError, Scorer, UserError, settings
from alignbench.runtime.credentials import scorer_authorization
from alignbench.scorer import Images, as_arrays
from alignbench.scoring.serving import PROTOCOL, ScoreRequest, ScoreResponse, ServiceInfo, is_loopback, png

REFUSED = (400, 401, 403, 407, 413, 415, 422)
"""HTTP statuses by which a server refuses a request. Repeating it would not help."""
TRANSIENT = (408, 502, 503, 504)
"""HTTP statuses after which repeating a request may help."""
MAX_RESPONSE = 2**22
"""The largest response in bytes; 10,000 scores take 250,000."""
MAX_REASON = 2000
"""How many characters of a server's error message are used."""
LEAST_WAIT, LONGEST_WAIT = 0.1, 30.0
"""The shortest and the longest wait in seconds before a busy server is asked again, whatever its Retry-After says."""

Result = TypeVar("Result")


class Remote(Scorer):
    """A scorer service over HTTP."""

    class Settings(settings.Settings):
        url: settings.ServiceURL
        """The URL of the service, for instance http://127.0.0.1:8765, without a password or token."""
        token_file: str | None = None
        """A file that contains the service's token; null for the variable ALIGNBENCH_SCORER_TOKEN, if it is set."""
        timeout: float = Field(120, gt=0)
        """How many seconds one request may take, from its start to the last byte of the response. For the same time a server is
        asked again that is busy and says when to try again."""
        retries: int = Field(3, ge=0)
        """How often a request that got no response is repeated."""
        wait: float = Field(1.0, ge=0)
        """How many seconds to wait before the first repetition; the wait doubles each time."""
        batch: int = Field(32, ge=1)
        """The largest number of images in one request."""

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._info: ServiceInfo | None = None

    @property
    def info(self) -> ServiceInfo:
        """The service's description of itself, which is requested once.

        Raises:
            UserError: it has another version of the protocol.
        """
        if self._info is None:
            info = self._request(ServiceInfo, "GET", "")
            if info.protocol != PROTOCOL:
                raise UserError(
                    f"the scorer at {self.settings.url} uses protocol {info.protocol}, but this alignbench uses {PROTOCOL}"
                )
            self._info = info
        return self._info

    def prepare(self) -> None:
        self.info  # noqa: B018 - reports at once that the service is missing or has another protocol

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        arrays, scores = as_arrays(images), np.empty(len(prompts))
        if len(arrays) != len(prompts):
            raise UserError(f"the scorer got {len(arrays)} images and {len(prompts)} prompts")
        self.info  # noqa: B018 - refuses a service of another protocol before any image is sent
        for start in range(0, len(arrays), self.settings.batch):
            part = slice(start, start + self.settings.batch)
            request = ScoreRequest(prompts=list(prompts[part]), images=[png(array) for array in arrays[part]])
            response = self._request(ScoreResponse, "POST", "score", request.model_dump_json().encode())
            if len(response.scores) != len(request.prompts):
                counts = f"{len(response.scores)} scores for {len(request.prompts)} images"
                raise RunError(f"the scorer at {self.settings.url} returned {counts}")
            scores[part] = [np.nan if score is None else score for score in response.scores]
        return scores

    def _request(self, kind: type[Any], method: str, path: str, body: bytes | None = None) -> Any:
        """Sends one request, repeats it if necessary, and returns the parsed response, an object of class `kind`.

        Raises:
            UserError: the service refuses the request.
            RunError: it cannot be reached, it failed, or its response is not that of a scorer.
        """
        o = self.settings
        url = f"{o.url.rstrip('/')}/{path}"
        authorization = scorer_authorization(o.token_file)
        failures, busy_until = 0, time.monotonic() + o.timeout
        while True:
            try:
                response = _within(o.timeout, lambda ended: _exchange(method, url, body, authorization, o.timeout, ended))
                if response.status not in TRANSIENT:
                    break
                if response.retry_after is not None and time.monotonic() < busy_until:
                    time.sleep(response.retry_after)
                    continue
                reason = f"HTTP {response.status}"
            except (requests.RequestException, HTTPError, TimeoutError) as error:
                reason = _reason(error)
            failures += 1
            if failures > o.retries:
                tries = "1 try" if failures == 1 else f"{failures} tries"
                raise RunError(f"the scorer at {o.url} does not answer ({reason}, {tries}){_via(url)}")
            time.sleep(o.wait * 2 ** (failures - 1))
        if 300 <= response.status < 400:
            raise UserError(f"the scorer at {o.url} redirects to {response.location}; set the URL to where it is{_via(url)}")
        if response.status in REFUSED:
            raise UserError(f"the scorer at {o.url} refuses: {_error_of(response)}{_via(url)}")
        if response.status != 200:
            raise RunError(f"the scorer at {o.url} failed: {_error_of(response)}{_via(url)}")
        try:
            return kind.model_validate_json(response.content)
        except ValueError:
            raise RunError(f"{url} answers, but not as a scorer of alignbench does{_via(url)}") from None

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "service": self.info.model_dump()}


class _Authorization(AuthBase):
    """Sets the Authorization header of a request. Even if it sets none, its presence keeps requests from reading `~/.netrc`."""

    def __init__(self, value: str | None) -> None:
        self.value = value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.value is not None:
            request.headers["Authorization"] = self.value
        return request


class _Response(NamedTuple):
    """What is used of an HTTP response."""

    status: int
    content: bytes
    retry_after: float | None
    """How many seconds a busy server asks to wait; None if it does not say."""
    location: str
    """The target of a redirect, without its path."""


def _within(seconds: float, work: Callable[[threading.Event], Result]) -> Result:
    """Returns `work(ended)`, or sets `ended` and raises TimeoutError after `seconds`.

    The timeouts of a socket are not a deadline, since each byte that arrives restarts them.
    """
    result: Future[Result] = Future()
    ended = threading.Event()

    def run() -> None:
        try:
            result.set_result(work(ended))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    finally:
        ended.set()


def _exchange(
    method: str, url: str, body: bytes | None, authorization: str | None, timeout: float, ended: threading.Event
) -> _Response:
    """Sends a request and reads its response.

    Args:
        method: the HTTP method.
        url: the URL.
        body: the request's body; None for none.
        authorization: the value of the Authorization header; None for none.
        timeout: the timeout of each operation on the socket, in seconds.
        ended: is set when nobody waits for the response any longer.
    """
    host = urlsplit(url).hostname or ""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # a response that is not compressed
    with requests.request(
        method,
        url,
        data=body,
        headers=headers,
        timeout=timeout,
        auth=_Authorization(authorization),
        allow_redirects=False,
        stream=True,
        proxies={"no_proxy": host} if is_loopback(host) else None,
    ) as response:
        content = bytearray()
        for chunk in response.raw.stream(2**16, decode_content=False):
            content += chunk
            if len(content) > MAX_RESPONSE:
                raise RunError(f"{url} answers with more than {MAX_RESPONSE} bytes, as no scorer does{_via(url)}")
            if ended.is_set():
                break
        after = response.headers.get("Retry-After", "")
        target = urlsplit(urljoin(url, response.headers.get("Location", "")))
        return _Response(
            response.status_code,
            bytes(content),
            min(max(float(after[:9]), LEAST_WAIT), LONGEST_WAIT) if after.isdecimal() else None,
            f"{target.scheme}://{target.netloc}"[:200],
        )


def _reason(error: Exception) -> str:
    """Why a request got no response, for messages."""
    if isinstance(error, requests.Timeout | TimeoutError):
        return "it took too long"
    if isinstance(error, requests.exceptions.SSLError):
        return f"TLS: {_innermost(error)}"
    return type(error).__name__


def _innermost(error: BaseException) -> str:
    """The message of the original error, which libraries wrap several times."""
    inner = getattr(error, "reason", None) or next((each for each in error.args if isinstance(each, BaseException)), None)
    return _innermost(inner) if isinstance(inner, BaseException) else str(error)


def _via(url: str) -> str:
    """The end of a message that names the proxy which the environment sets for the service, without its password."""
    host = urlsplit(url).hostname or ""
    proxy = None if is_loopback(host) else requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    if not proxy:
        return ""
    return f" (through the proxy {proxy.rpartition('@')[2]}, which the environment sets; NO_PROXY={host} avoids it)"


def _error_of(response: _Response) -> str:
    """The error message in a response, or else its HTTP status."""
    try:
        return str(json.loads(response.content)["error"])[:MAX_REASON]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"HTTP {response.status}"
