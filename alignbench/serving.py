"""A scorer as an HTTP service: what `serve-scorer` offers and the eval `remote` calls.

    GET  /       -> ServiceInfo
    POST /score  ScoreRequest -> ScoreResponse

All JSON, with each picture as a PNG in base64. Nothing that is received is ever executed or unpickled. A score of null means
that the scorer gave up on this item; a scorer that fails answers with status 500 and the reason.
"""

import base64
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from alignbench import __version__, hub
from alignbench.errors import RunError, UserError
from alignbench.images import decode_image, image_size
from alignbench.scorer import Scorer, checked_scores
from alignbench.settings import first_problem

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

PROTOCOL = 1
MAX_PIXELS = 256_000_000
"""Of all pictures of a request: what small PNGs may unfold to."""


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


def application(scorer: Scorer, *, max_bytes: int) -> "Starlette":
    """The service as an ASGI application; requests are scored one after the other.

    Args:
        max_bytes: of one request's body; a larger one is refused unread.

    Raises:
        UserError: the web framework is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise UserError("serve-scorer needs starlette and uvicorn: pip install 'alignbench[serve]'") from None
    lock = threading.Lock()

    def scored(body: bytes) -> Response:
        try:
            images, prompts = _request(body)
            with lock:
                answer = checked_scores(scorer.score(images, prompts), len(images), scorer.name)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 422)
        except Exception as error:  # whatever a scorer raises: the caller is told, the service goes on
            reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            return JSONResponse({"error": reason}, 500)
        response = ScoreResponse(scores=[None if np.isnan(score) else float(score) for score in answer])
        return Response(response.model_dump_json(), media_type="application/json")

    async def score(request: "Request") -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                return JSONResponse({"error": f"the request is larger than {max_bytes} bytes; ask for fewer pictures"}, 413)
        return await run_in_threadpool(scored, bytes(body))

    async def info(request: "Request") -> Response:
        about = ServiceInfo(scorer=scorer.name, about=scorer.describe())
        return Response(about.model_dump_json(), media_type="application/json")

    return Starlette(routes=[Route("/", info, methods=["GET"]), Route("/score", score, methods=["POST"])])


def serve(scorer: Scorer, host: str, port: int, max_bytes: int) -> None:
    """Serves until it is interrupted; what the scorer lacks is told first."""
    hub.require(dict.fromkeys(scorer.from_hub(), scorer.name))
    scorer.prepare()
    app = application(scorer, max_bytes=max_bytes)
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="info")


def _request(body: bytes) -> tuple[Sequence[Image.Image], list[str]]:
    """The pictures and prompts of a request.

    Raises:
        UserError: it is no such request, or a picture is no PNG, or they are too large.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise UserError(first_problem(error, "the body")) from None
    if len(request.images) != len(request.prompts):
        raise UserError(f"there are {len(request.images)} images for {len(request.prompts)} prompts")
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
