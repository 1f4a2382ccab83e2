"""A scorer served and asked over loopback."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import uvicorn
from PIL import Image

from alignbench import RunError, Scorer, UserError, load_scorer, run, serving
from alignbench.launch import free_port
from alignbench.record import read_result
from alignbench.scorer import Images, as_arrays
from alignbench.serving import ScoreRequest, application, png
from alignbench.settings import Settings
from tests.plugins import toy_config, write_task


class Red(Scorer):
    """The red of the first pixel; NaN for black, an error for the prompt `fail` and a refusal for `refuse`."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        if "fail" in prompts:
            raise ZeroDivisionError("by nought")
        if "refuse" in prompts:
            raise UserError("no such prompts here")
        red = np.array([float(picture[0, 0, 0]) for picture in as_arrays(images)])
        return np.where(red == 0, np.nan, red)


@contextmanager
def served(max_bytes: int = 2**20, port: int = 0, scorer: Scorer | None = None) -> Iterator[str]:
    """The URL of the scorer on a free port of this machine."""
    scorer = scorer or Red(Settings())
    scorer.name = "red"
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(application(scorer, max_bytes=max_bytes), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def picture(red: int, side: int = 4) -> np.ndarray:
    found = np.zeros((side, side, 3), np.uint8)
    found[..., 0] = red
    return found


def remote(url: str, **settings: Any) -> Scorer:
    return load_scorer("remote", url=url, **{"wait": 0.0, "retries": 1, "timeout": 20.0, **settings})


def test_scores_cross_the_wire_in_batches_and_a_failed_item_stays_one() -> None:
    with served() as url:
        scorer = remote(url, batch=2)
        pictures = [Image.fromarray(picture(red)) for red in (7, 0, 255, 1, 9)]
        assert scorer.score(pictures, ["é", '"星"', "x", "x", "x"]) == pytest.approx([7, np.nan, 255, 1, 9], nan_ok=True)
        assert scorer.score([], []).shape == (0,)
        assert scorer.describe()["service"]["scorer"] == "red"


def test_a_failing_scorer_and_a_refused_request_are_told_apart() -> None:
    with served() as url:
        scorer = remote(url)
        with pytest.raises(RunError, match="failed: ZeroDivisionError: by nought"):
            scorer.score([picture(1)], ["fail"])
        with pytest.raises(UserError, match="refuses: no such prompts here"):
            scorer.score([picture(1)], ["refuse"])
        assert scorer.score([picture(3)], ["x"]).tolist() == [3]  # the service goes on


def test_what_the_service_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MAX_PIXELS", 90)  # of all together: 16 and 81
    text = base64.b64encode(b"no png").decode()
    with served(max_bytes=2000) as url:
        for body, status, says in [
            ("{", 422, "invalid json"),
            (json.dumps({"prompts": ["a"], "images": []}), 422, "0 images for 1 prompts"),
            (json.dumps({"prompts": ["a"], "images": [text]}), 422, "image 0 is not a PNG"),
            (json.dumps({"prompts": ["a", "b"], "images": [png(picture(1)), png(picture(1, 9))]}), 422, "more than 90 pixels"),
            (json.dumps({"prompts": ["a"], "images": [png(picture(1))], "pickle": "x"}), 422, "extra inputs"),
            (ScoreRequest(prompts=["x" * 3000], images=[png(picture(1))]).model_dump_json(), 413, "larger than 2000 bytes"),
        ]:
            answer = requests.post(f"{url}/score", data=body, timeout=20)
            assert answer.status_code == status
            assert says in answer.json()["error"]
        with pytest.raises(UserError, match="refuses: the request is larger"):
            remote(url).score(np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8), ["x"])


def test_a_server_that_is_not_there_or_is_something_else_never_gives_a_score() -> None:
    port = free_port()
    with pytest.raises(RunError, match=rf"http://127.0.0.1:{port} does not answer \(ConnectionError, 2 tries\)"):
        remote(f"http://127.0.0.1:{port}").score([picture(1)], ["x"])
    with pytest.raises(UserError, match="url"):
        remote("file:///etc/passwd")


class Late(Red):
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        time.sleep(0.5)
        return super().score(images, prompts)


def test_a_server_that_takes_too_long_is_given_up() -> None:
    with served(scorer=Late(Settings())) as url, pytest.raises(RunError, match="it took too long, 1 tries"):
        remote(url, timeout=0.1, retries=0).score([picture(1)], ["x"])


def test_a_run_whose_server_dies_goes_on_where_it_stood(tmp_path: Path) -> None:
    class Dying(Red):
        calls = 0

        def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
            Dying.calls += 1
            if Dying.calls == 3:
                raise ConnectionError("the model is gone")
            return super().score(images, prompts) + 1

    with served(scorer=Dying(Settings())) as url:
        config = toy_config(write_task(tmp_path), scorer_url=url)
        with pytest.raises(RunError, match="the model is gone; once it works, go on with: alignbench run --resume"):
            run(config, tmp_path / "run")
        assert (tmp_path / "run" / "checkpoints" / "iteration-1").is_dir()
        result = run(config, tmp_path / "run", resume=True)
    assert (result.run.iterations, result.budget.failed_scores) == (3, read_result(tmp_path / "run").budget.failed_scores)
    assert result.metrics["remote"].role == "reward"
    assert result.metrics["brightness"].role == "judge"
    assert result.protocol.evals["remote"]["service"]["scorer"] == "red"
