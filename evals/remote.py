"""remote: a scorer in another process or on another machine, which `serve-scorer` offers there over HTTP.

Pictures travel as PNG, everything else as JSON (see `alignbench.serving`). A server that cannot be reached, or that fails,
stops the run with one sentence and a checkpoint; it never becomes a score.

A service that asks for a token gets it from the file that `token_file` names, or else from the variable
ALIGNBENCH_SCORER_TOKEN. It is read for each request and stands in no record; `~/.netrc` is not read.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import requests
from pydantic import Field
from requests.auth import AuthBase

from alignbench import RunError, Scorer, UserError, settings
from alignbench.credentials import scorer_authorization
from alignbench.scorer import Images, as_arrays
from alignbench.serving import PROTOCOL, ScoreRequest, ScoreResponse, ServiceInfo, png

REFUSED = (400, 413, 422)
"""HTTP statuses by which a server refuses what it was asked: asking again would not help."""


class Remote(Scorer):
    class Settings(settings.Settings):
        url: settings.ServiceURL
        """Where the service listens, for instance http://127.0.0.1:8765; without a password or token."""
        token_file: str | None = None
        """A file whose content is the service's token; null for the variable ALIGNBENCH_SCORER_TOKEN, if it is there."""
        timeout: float = Field(120, gt=0)
        """Seconds for one request."""
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
        reason = ""
        for attempt in range(o.retries + 1):
            if attempt:
                time.sleep(o.wait * 2 ** (attempt - 1))
            try:
                headers = {"Content-Type": "application/json"}
                response = requests.request(
                    method, url, data=body, headers=headers, timeout=o.timeout, auth=_Authorization(authorization)
                )
            except requests.RequestException as error:
                reason = "it took too long" if isinstance(error, requests.Timeout) else type(error).__name__
                continue
            if response.status_code in (502, 503, 504):
                reason = f"HTTP {response.status_code}"
                continue
            if response.status_code in REFUSED:
                raise UserError(f"the scorer at {o.url} refuses: {_error_of(response)}")
            if response.status_code != 200:
                raise RunError(f"the scorer at {o.url} failed: {_error_of(response)}")
            try:
                return kind.model_validate_json(response.content)
            except ValueError:
                raise RunError(f"{url} answers, but not as a scorer of alignbench does") from None
        raise RunError(f"the scorer at {o.url} does not answer ({reason}, {o.retries + 1} tries)")

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


def _error_of(response: requests.Response) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
