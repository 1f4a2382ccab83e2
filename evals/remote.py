"""remote: a scorer in another process or on another machine, which `serve-scorer` offers there over HTTP.

Images travel as PNG, everything else as JSON (see `alignbench.scoring.serving`). A server that cannot be reached, or that
fails, stops the run with one sentence and a checkpoint; it never becomes a score.

The server is not trusted with more than its scores: it gets one deadline for a whole request, its answer has a largest size,
and redirects are not followed. This machine is never asked through a proxy; other machines are where the environment says so,
and then each error names the proxy. TLS certificates are verified.

A service that asks for a token gets it from the file that `token_file` names, or else from the variable
ALIGNBENCH_SCORER_TOKEN. It is read for each request, and stands in no record; `~/.netrc` is not read.
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
"""HTTP statuses by which a server refuses what it was asked: asking again would not help."""
TRANSIENT = (408, 502, 503, 504)
"""HTTP statuses after which asking again may help."""
MAX_ANSWER = 2**22
"""Bytes of one answer; 10,000 scores have 250,000."""
MAX_REASON = 2000
"""Letters of an error that a server tells."""
LONGEST_WAIT = 30.0
"""Seconds after which a server that is busy is asked again, whatever it says."""

Result = TypeVar("Result")


class Remote(Scorer):
    class Settings(settings.Settings):
        url: settings.ServiceURL
        """Where the service listens, for instance http://127.0.0.1:8765; without a password or token."""
        token_file: str | None = None
        """A file whose content is the service's token; null for the variable ALIGNBENCH_SCORER_TOKEN, if it is there."""
        timeout: float = Field(120, gt=0)
        """Seconds for one request, from its beginning to the last byte of its answer. A server that answers that it is busy,
        and when to ask again, is asked again for as long."""
        retries: int = Field(3, ge=0)
        """Further tries after one that got no answer."""
        wait: float = Field(1.0, ge=0)
        """Seconds before the first further try; each next one waits twice as long."""
        batch: int = Field(32, ge=1)
        """Pictures in one request."""

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._info: ServiceInfo | None = None

    @property
    def info(self) -> ServiceInfo:
        """What the service says about itself, asked once."""
        if self._info is None:
            info = self._answer(ServiceInfo, "GET", "")
            if info.protocol != PROTOCOL:
                raise UserError(
                    f"the scorer at {self.settings.url} speaks protocol {info.protocol}, this alignbench {PROTOCOL}"
                )
            self._info = info
        return self._info

    def prepare(self) -> None:
        self.info  # noqa: B018  (a service that is not there, or of another protocol, is told at once)

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        pictures, scores = as_arrays(images), np.empty(len(prompts))
        if len(pictures) != len(prompts):
            raise UserError(f"the scorer got {len(pictures)} pictures and {len(prompts)} prompts")
        self.info  # noqa: B018  (a service of another protocol is refused before it is asked)
        for start in range(0, len(pictures), self.settings.batch):
            part = slice(start, start + self.settings.batch)
            request = ScoreRequest(prompts=list(prompts[part]), images=[png(p) for p in pictures[part]])
            answer = self._answer(ScoreResponse, "POST", "score", request.model_dump_json().encode())
            if len(answer.scores) != len(request.prompts):
                wrong = f"{len(answer.scores)} scores for {len(request.prompts)} pictures"
                raise RunError(f"the scorer at {self.settings.url} answered {wrong}")
            scores[part] = [np.nan if score is None else score for score in answer.scores]
        return scores

    def _answer(self, kind: type[Any], method: str, path: str, body: bytes | None = None) -> Any:
        """The parsed answer of one request.

        Raises:
            UserError: the service refuses what it was asked.
            RunError: it cannot be reached, failed, or answers something else.
        """
        o = self.settings
        url = f"{o.url.rstrip('/')}/{path}"
        authorization = scorer_authorization(o.token_file)
        failures, busy_until = 0, time.monotonic() + o.timeout
        while True:
            try:
                answer = _within(o.timeout, lambda ended: _exchange(method, url, body, authorization, o.timeout, ended))
                if answer.status not in TRANSIENT:
                    break
                if answer.retry_after is not None and time.monotonic() < busy_until:
                    time.sleep(answer.retry_after)
                    continue
                reason = f"HTTP {answer.status}"
            except (requests.RequestException, HTTPError, TimeoutError) as error:
                reason = _reason(error)
            failures += 1
            if failures > o.retries:
                raise RunError(f"the scorer at {o.url} does not answer ({reason}, {failures} tries){_via(url)}")
            time.sleep(o.wait * 2 ** (failures - 1))
        if 300 <= answer.status < 400:
            raise UserError(f"the scorer at {o.url} redirects to {answer.location}; set the URL to where it is{_via(url)}")
        if answer.status in REFUSED:
            raise UserError(f"the scorer at {o.url} refuses: {_error_of(answer)}{_via(url)}")
        if answer.status != 200:
            raise RunError(f"the scorer at {o.url} failed: {_error_of(answer)}{_via(url)}")
        try:
            return kind.model_validate_json(answer.content)
        except ValueError:
            raise RunError(f"{url} answers, but not as a scorer of alignbench does{_via(url)}") from None

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "service": self.info.model_dump()}


class _Authorization(AuthBase):
    """What a request is authorized by. That there is one, even an empty one, keeps requests from reading `~/.netrc`."""

    def __init__(self, value: str | None) -> None:
        self.value = value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.value is not None:
            request.headers["Authorization"] = self.value
        return request


class _Answer(NamedTuple):
    status: int
    content: bytes
    retry_after: float | None
    """Seconds after which a busy server wants to be asked again; None where it does not say."""
    location: str
    """Where a redirect leads, without its path."""


def _within(seconds: float, work: Callable[[threading.Event], Result]) -> Result:
    """`work(ended)`, or TimeoutError after so long; `ended` is set then.

    The timeouts of sockets are no deadline: each byte that comes in starts them anew.
    """
    result: Future[Result] = Future()
    ended = threading.Event()

    def do() -> None:
        try:
            result.set_result(work(ended))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=do, daemon=True).start()
    try:
        return result.result(seconds)
    finally:
        ended.set()


def _exchange(
    method: str, url: str, body: bytes | None, authorization: str | None, timeout: float, ended: threading.Event
) -> _Answer:
    """One request and its answer.

    Args:
        timeout: of each operation on the socket.
        ended: nobody waits for the answer any longer.
    """
    host = urlsplit(url).hostname or ""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # nothing that unfolds
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
            if len(content) > MAX_ANSWER:
                raise RunError(f"{url} answers with more than {MAX_ANSWER} bytes, which is no scorer's answer{_via(url)}")
            if ended.is_set():
                break
        after = response.headers.get("Retry-After", "")
        target = urlsplit(urljoin(url, response.headers.get("Location", "")))
        return _Answer(
            response.status_code,
            bytes(content),
            min(float(after[:9]), LONGEST_WAIT) if after.isdecimal() else None,
            f"{target.scheme}://{target.netloc}"[:200],
        )


def _reason(error: Exception) -> str:
    if isinstance(error, requests.Timeout | TimeoutError):
        return "it took too long"
    if isinstance(error, requests.exceptions.SSLError):
        return f"TLS: {_innermost(error)}"
    return type(error).__name__


def _innermost(error: BaseException) -> str:
    """What was wrong at first, as libraries wrap it several times."""
    inner = getattr(error, "reason", None) or next((each for each in error.args if isinstance(each, BaseException)), None)
    return _innermost(inner) if isinstance(inner, BaseException) else str(error)


def _via(url: str) -> str:
    """The proxy that the environment puts before the service, without its password, as the end of a sentence."""
    host = urlsplit(url).hostname or ""
    proxy = None if is_loopback(host) else requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    if not proxy:
        return ""
    return f" (asked through the proxy {proxy.rpartition('@')[2]}, as the environment says; NO_PROXY={host} goes past it)"


def _error_of(answer: _Answer) -> str:
    try:
        return str(json.loads(answer.content)["error"])[:MAX_REASON]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"HTTP {answer.status}"
