"""A scorer as an HTTP service, which `serve-scorer` offers and the eval `remote` uses.

    GET  /       -> ServiceInfo
    POST /score  ScoreRequest -> ScoreResponse

Requests and responses are JSON, with each image as a PNG in base64. Received data are never executed or unpickled. A score of
null means that the scorer could not score this image. Any status other than 200 comes with `{"error": one sentence}`:

    400  the body is not a ScoreRequest, or one of its images is not a PNG
    401  the token is missing or wrong
    403  the Host header names another machine, or the request comes from a web page of another site
    408  the body arrived too slowly
    413  the body is larger than the service accepts
    415  the content type is not application/json
    422  the scorer refuses these images or prompts
    500  the scorer failed
    503  too many requests are waiting; the header Retry-After says when to try again
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
"""The version of the protocol."""
MAX_PIXELS = 256_000_000
"""The largest number of pixels of all images of a request, because a small PNG can decompress to many."""
MAX_IMAGES = 10_000
"""The largest number of images of a request."""
QUEUE = 32
"""How many requests may wait while another one is processed."""
MAX_REASON = 2000
"""How many characters of a failure's message a client gets."""


class _Message(BaseModel):
    """A request or a response; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class ServiceInfo(_Message):
    """What a service says about itself."""

    protocol: int = PROTOCOL
    alignbench: str = __version__
    scorer: str
    about: dict[str, Any]
    """The scorer's description of itself: model, device, settings."""


class ScoreRequest(_Message):
    """Images to be scored, with their prompts."""

    prompts: list[str]
    images: list[str]
    """One image for each prompt, a PNG in base64."""


class ScoreResponse(_Message):
    """The scores of a request's images."""

    scores: list[FiniteFloat | None]
    """One score for each image; None where it could not be scored."""


def png(image: np.ndarray) -> str:
    """Encodes an image, uint8 [h, w, 3], as a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def is_loopback(host: str) -> bool:
    """Tells whether a host is a name or an address by which only this machine reaches itself."""
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
    """Lists the names by which clients may address a service that listens on this host, in lower case."""
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
    """Makes the service, an ASGI application that scores one request at a time.

    It must be run with `alignbench.scoring.http_guard.uvicorn_options()`.

    Args:
        scorer: the scorer.
        max_bytes: the largest body of a request. A larger one is refused before it is read if its length is announced, and
            otherwise once that many bytes have been received.
        queue: how many requests may wait. Each takes only the memory of its body, since images are decompressed in its turn.
        hosts: the names of this machine that a request may be addressed to, in lower case. Its addresses are always accepted.
        authorization: the Authorization header that each request must have; None if none is required.

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
        """Reports an exception of the scorer: one line to the client, all of it in the log. The service continues."""
        logging.getLogger("uvicorn.error").error("the scorer failed", exc_info=error)
        reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        return JSONResponse({"error": str(RunError(reason[:MAX_REASON]))}, 500)

    def score_body(body: bytearray) -> Response:
        try:
            images, prompts = _request(body)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        try:
            scores = checked_scores(scorer.score(images, prompts), len(images), scorer.name)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 422)
        except Exception as error:
            return failed(error)
        response = ScoreResponse(scores=[None if np.isnan(score) else float(score) for score in scores])
        return Response(response.model_dump_json(), media_type="application/json")

    async def score(request: "Request") -> Response:
        try:
            http_guard.check_body(request.headers, max_bytes)
            async with waiting.place():
                body = await http_guard.read_body(request, max_bytes)
                await request.is_disconnected()  # makes uvicorn read on, so that it notices when the client disconnects
                async with waiting.turn():
                    if await request.is_disconnected():
                        raise ClientDisconnect
                    return await run_in_threadpool(score_body, body)
        except http_guard.Refusal as refusal:
            return refusal.response()
        except ClientDisconnect:  # nobody reads the response
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
    """Serves a scorer until it is interrupted. Missing weights are reported before it starts.

    Args:
        scorer: the scorer.
        host: the address to listen on.
        port: the port to listen on.
        max_bytes: the largest body of a request.
        queue: how many requests may wait.
        token_file: a file that contains the token which each request must have; None for the variable ALIGNBENCH_SCORER_TOKEN,
            if it is set.
        allowed_hosts: further names by which this machine may be addressed, for instance through a reverse proxy.

    Raises:
        UserError: weights are missing, the token cannot be read, or the web framework is not installed.
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
            f"alignbench: everyone who can reach {host}:{port} can use this scorer; --token-file requires a token",
            file=sys.stderr,
        )
    uvicorn.run(app, host=host, port=port, log_level="info", **uvicorn_options())


def _request(body: bytes | bytearray) -> tuple[Sequence[Image.Image], list[str]]:
    """Parses a request into its images and prompts.

    Raises:
        UserError: it is not a ScoreRequest, an image is not a PNG, or the images are too many or too large.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise UserError(first_problem(error, "the body")) from None
    if len(request.images) != len(request.prompts):
        raise UserError(f"there are {len(request.images)} images for {len(request.prompts)} prompts")
    if len(request.images) > MAX_IMAGES:
        raise UserError(f"there are more than {MAX_IMAGES} images; send fewer at a time")
    files, pixels = [], 0
    for number, text in enumerate(request.images):
        with _png_errors(number):
            files.append(base64.b64decode(text, validate=True))
            width, height = image_size(files[-1], ("PNG",))
        pixels += width * height  # read from the file's header, before anything is decompressed
        if pixels > MAX_PIXELS:
            raise UserError(f"the images have more than {MAX_PIXELS} pixels; send fewer at a time")
    images = []
    for number, file in enumerate(files):
        with _png_errors(number):
            images.append(decode_image(file, ("PNG",)))
    return images, request.prompts


@contextmanager
def _png_errors(number: int) -> Iterator[None]:
    """Turns errors about an image's encoding into a UserError that names the image."""
    try:
        yield
    except (UserError, ValueError) as error:  # a ValueError means that it is not base64
        raise UserError(f"image {number} is not a PNG in base64: {error}") from None
