"""A scorer as an HTTP service: what `serve-scorer` offers and the eval `remote` calls.

    GET  /       -> ServiceInfo
    POST /score  ScoreRequest -> ScoreResponse

All JSON, with each image as a PNG in base64. Nothing that is received is ever executed or unpickled. A score of null means
that the scorer gave up on this item. Any other status than 200 comes with `{"error": one sentence}`:

    400  the body is not a ScoreRequest, or one of its images is not a PNG
    401  the token is missing or wrong
    403  the Host header names another machine, or a web page of another site asks
    408  the body came too slowly
    413  the body is larger than the service takes
    415  the content type is not application/json
    422  the scorer refuses these images or prompts
    500  the scorer failed
    503  too many requests are waiting; the header Retry-After says when to ask again
"""

import base64
import io
import ipaddress
import logging
import socket
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from alignbench import __version__
from alignbench.errors import RunError, UserError
from alignbench.files.images import decode_image, image_size
from alignbench.runtime import hub
from alignbench.runtime.credentials import scorer_authorization
from alignbench.scorer import Scorer, checked_scores
from alignbench.settings import first_problem

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp

PROTOCOL = 1
MAX_PIXELS = 256_000_000
"""Of all images of a request: what small PNGs may unfold to."""
MAX_IMAGES = 10_000
"""Of a request."""
QUEUE = 32
"""Requests that wait while another one is answered."""
MAX_REASON = 2000
"""Letters of what a client is told about a failure."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ServiceInfo(_Message):
    protocol: int = PROTOCOL
    alignbench: str = __version__
    scorer: str
    about: dict[str, Any]
    """The scorer's own description: model, device, settings."""


class ScoreRequest(_Message):
    prompts: list[str]
    images: list[str]
    """PNG in base64, one for each prompt."""


class ScoreResponse(_Message):
    scores: list[FiniteFloat | None]


def png(picture: np.ndarray) -> str:
    """uint8 [h, w, 3] as it travels."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def is_loopback(host: str) -> bool:
    """Whether it is a name or an address by which this machine reaches itself alone."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(name))  # 127.1 is another way to write 127.0.0.1
        except OSError:
            return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def names_of_this_machine(host: str) -> set[str]:
    """The names by which clients may call a service that listens on this host."""
    names = {"localhost", host.lower()}
    return names if is_loopback(host) else names | {socket.gethostname().lower(), socket.getfqdn().lower()}


def application(
    scorer: Scorer,
    *,
    max_bytes: int,
    queue: int = QUEUE,
    hosts: Collection[str] = ("localhost",),
    authorization: str | None = None,
) -> "ASGIApp":
    """The service as an ASGI application; requests are scored one after the other.

    To be run with `alignbench.scoring.http_guard.uvicorn_options()`.

    Args:
        max_bytes: of one request's body. A larger one is refused unread where its length is announced, otherwise once that
            much has come.
        queue: how many requests may wait. Each holds no more than its body: images are decompressed in its turn.
        hosts: names of this machine that a request may be addressed to, in lower case. Its addresses are always among them.
        authorization: the Authorization header that each request must have; None for no such demand.

    Raises:
        UserError: the web framework is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route

        from alignbench.scoring import http_guard
    except ImportError:
        raise UserError("serve-scorer needs starlette and uvicorn: pip install 'alignbench[serve]'") from None
    waiting = http_guard.Queue(queue)

    def failed(error: Exception) -> Response:
        """Whatever a scorer raises: the client is told in one line, the log has the rest, and the service goes on."""
        logging.getLogger("uvicorn.error").error("the scorer failed", exc_info=error)
        reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        return JSONResponse({"error": str(RunError(reason[:MAX_REASON]))}, 500)

    def scored(body: bytearray) -> Response:
        try:
            images, prompts = _request(body)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        try:
            answer = checked_scores(scorer.score(images, prompts), len(images), scorer.name)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 422)
        except Exception as error:
            return failed(error)
        response = ScoreResponse(scores=[None if np.isnan(score) else float(score) for score in answer])
        return Response(response.model_dump_json(), media_type="application/json")

    async def score(request: "Request") -> Response:
        try:
            http_guard.check_body(request.headers, max_bytes)
            async with waiting.place():
                body = await http_guard.read_body(request, max_bytes)
                await request.is_disconnected()  # which makes uvicorn read on, and so notice it when the client leaves
                async with waiting.turn():
                    if await request.is_disconnected():
                        raise ClientDisconnect
                    return await run_in_threadpool(scored, body)
        except http_guard.Refusal as refusal:
            return refusal.response()
        except ClientDisconnect:  # it has given up, and asks again if it wants to
            return Response(status_code=408)

    async def info(request: "Request") -> Response:
        try:
            about = ServiceInfo(scorer=scorer.name, about=scorer.describe())
        except Exception as error:
            return failed(error)
        return Response(about.model_dump_json(), media_type="application/json")

    routes = [Route("/", info, methods=["GET"]), Route("/score", score, methods=["POST"])]
    return http_guard.guarded(Starlette(routes=routes), hosts, authorization)


def serve(
    scorer: Scorer,
    host: str,
    port: int,
    max_bytes: int,
    *,
    queue: int = QUEUE,
    token_file: Path | None = None,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serves until it is interrupted; what the scorer lacks is told first.

    Args:
        token_file: whose content each request must bring as its token; None for the variable ALIGNBENCH_SCORER_TOKEN, if it
            is there.
        allowed_hosts: names of this machine beside its own, such as one that a reverse proxy goes by.
    """
    authorization = scorer_authorization(token_file)
    hub.require(dict.fromkeys(scorer.from_hub(), scorer.name))
    scorer.prepare()
    hosts = names_of_this_machine(host) | {name.lower() for name in allowed_hosts}
    app = application(scorer, max_bytes=max_bytes, queue=queue, hosts=hosts, authorization=authorization)
    import uvicorn

    from alignbench.scoring.http_guard import uvicorn_options

    if authorization is None and not is_loopback(host):
        print(
            f"alignbench: whoever can reach {host}:{port} can use this scorer; --token-file asks for a token", file=sys.stderr
        )
    uvicorn.run(app, host=host, port=port, log_level="info", **uvicorn_options())


def _request(body: bytes | bytearray) -> tuple[Sequence[Image.Image], list[str]]:
    """The images and prompts of a request.

    Raises:
        UserError: it is not such a request, or an image is not a PNG, or they are too large.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise UserError(first_problem(error, "the body")) from None
    if len(request.images) != len(request.prompts):
        raise UserError(f"there are {len(request.images)} images for {len(request.prompts)} prompts")
    if len(request.images) > MAX_IMAGES:
        raise UserError(f"there are more than {MAX_IMAGES} images; ask for fewer at a time")
    files, pixels = [], 0
    for number, text in enumerate(request.images):
        with _no_png(number):
            files.append(base64.b64decode(text, validate=True))
            width, height = image_size(files[-1], ("PNG",))
        pixels += width * height  # known from its head, before anything is unfolded
        if pixels > MAX_PIXELS:
            raise UserError(f"the images have more than {MAX_PIXELS} pixels; ask for fewer at a time")
    images = []
    for number, file in enumerate(files):
        with _no_png(number):
            images.append(decode_image(file, ("PNG",)))
    return images, request.prompts


@contextmanager
def _no_png(number: int) -> Iterator[None]:
    try:
        yield
    except (UserError, ValueError) as error:  # ValueError: it is not base64
        raise UserError(f"image {number} is not a PNG in base64: {error}") from None
