"""A scorer served and asked over loopback."""

import base64
import gzip
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import uvicorn
from PIL import Image

from alignbench import RunError, Scorer, UserError, load_scorer, run
from alignbench.files.images import decode_image
from alignbench.records.record import read_result
from alignbench.runtime.launch import free_port
from alignbench.scorer import Images, as_arrays
from alignbench.scoring import http_guard, serving
from alignbench.scoring.serving import ScoreRequest, application, is_loopback, names_of_this_machine, png
from alignbench.settings import Settings
from evals import remote as client
from tests.support.plugins import toy_config, write_task

JSON = {"Content-Type": "application/json"}


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
def served(max_bytes: int = 2**20, port: int = 0, scorer: Scorer | None = None, **options: Any) -> Iterator[str]:
    """The URL of the scorer on a free port of this machine."""
    scorer = scorer or Red(Settings())
    scorer.name = "red"
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    app = application(scorer, max_bytes=max_bytes, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **http_guard.uvicorn_options()))
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
    monkeypatch.setattr(serving, "MAX_IMAGES", 2)
    text = base64.b64encode(b"no png").decode()
    with served(max_bytes=2000) as url:
        for body, status, says in [
            ("{", 400, "invalid json"),
            ("[" * 1999, 400, "recursion"),
            (json.dumps({"prompts": ["a"], "images": []}), 400, "0 images for 1 prompts"),
            (json.dumps({"prompts": ["a"] * 3, "images": [""] * 3}), 400, "more than 2 images"),
            (json.dumps({"prompts": ["a"], "images": [text]}), 400, "image 0 is not a PNG"),
            (json.dumps({"prompts": ["a", "b"], "images": [png(picture(1)), png(picture(1, 9))]}), 400, "more than 90 pixels"),
            (json.dumps({"prompts": ["a"], "images": [png(picture(1))], "pickle": "x"}), 400, "extra inputs"),
            (json.dumps({"prompts": ["refuse"], "images": [png(picture(1))]}), 422, "no such prompts here"),
            (ScoreRequest(prompts=["x" * 3000], images=[png(picture(1))]).model_dump_json(), 413, "larger than 2000 bytes"),
        ]:
            answer = requests.post(f"{url}/score", data=body, headers=JSON, timeout=20)
            assert answer.status_code == status
            assert says in answer.json()["error"]
            assert "\n" not in answer.json()["error"]
        with pytest.raises(UserError, match="refuses: the request is larger"):
            remote(url).score(np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8), ["x"])


def test_only_requests_to_this_machine_that_no_foreign_page_sends_are_answered() -> None:
    body = ScoreRequest(prompts=["a"], images=[png(picture(1))]).model_dump_json()
    with served(hosts=("localhost", "scorer.lab")) as url:
        port = url.rpartition(":")[2]
        cases: list[tuple[dict[str, str | None], int]] = [
            ({}, 200),
            ({"Host": "127.0.0.1"}, 200),  # through a tunnel the port is another one
            ({"Host": f"LOCALHOST:{port}"}, 200),
            ({"Host": "[::1]:1"}, 200),
            ({"Host": "scorer.lab."}, 200),
            ({"Host": "evil.example"}, 403),
            ({"Host": "127.0.0.1.evil.example"}, 403),
            ({"Host": "evil.example@127.0.0.1"}, 403),
            ({"Host": ""}, 403),
            ({"Host": "[::1"}, 403),
            ({"Origin": url}, 200),
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "http://127.0.0.1:1"}, 403),
            ({"Origin": "null"}, 403),
            ({"Content-Type": "text/plain"}, 415),
            ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
            ({"Content-Type": None}, 415),
            ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ]
        for headers, status in cases:
            answer = requests.post(f"{url}/score", data=body, headers={**JSON, **headers}, timeout=20)
            assert answer.status_code == status, headers
            assert "access-control-allow-origin" not in answer.headers
        assert requests.get(url, headers={"Host": "evil.example"}, timeout=20).status_code == 403
        preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        assert requests.options(f"{url}/score", headers=preflight, timeout=20).status_code == 403


def test_the_names_of_this_machine() -> None:
    for host in ("127.0.0.1", "localhost", "LOCALHOST.", "a.localhost", "127.3.2.1", "127.1", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(host), host
    for host in ("127.0.0.1.evil.example", "0.0.0.0", "::", "10.0.0.1", "scorer", "localhost.evil.example", ""):
        assert not is_loopback(host), host
    assert names_of_this_machine("127.0.0.1") == {"localhost", "127.0.0.1"}
    assert socket.gethostname().lower() in names_of_this_machine("0.0.0.0")


def test_a_service_with_a_token_answers_those_who_bring_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNBENCH_SCORER_TOKEN", raising=False)
    (tmp_path / "token").write_text("s3cret\n")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with served(authorization="Bearer s3cret") as url:
        for wrong in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Basic s3cret"}):
            answer = requests.get(url, headers=wrong, timeout=20, auth=lambda request: request)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        with pytest.raises(UserError, match="refuses: the token is missing"):
            remote(url).score([picture(1)], ["x"])
        assert remote(url, token_file=str(tmp_path / "token")).score([picture(3)], ["x"]).tolist() == [3]
        monkeypatch.setenv("ALIGNBENCH_SCORER_TOKEN", "s3cret")
        assert remote(url).score([picture(3)], ["x"]).tolist() == [3]
        monkeypatch.setenv("ALIGNBENCH_SCORER_TOKEN", "other")
        with pytest.raises(UserError, match="refuses: the token is not this service's"):
            remote(url).score([picture(1)], ["x"])


def raw(url: str, head: str) -> socket.socket:
    """A connection on which the head of a request, or a part of it, has been sent."""
    made = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)
    made.sendall(head.replace("\n", "\r\n").encode())
    return made


POST = "POST /score HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"


def test_a_body_is_refused_when_it_is_announced_and_while_it_streams() -> None:
    with served(max_bytes=2000) as url:
        with raw(url, POST + "Content-Length: 1000000000000\n\n{") as announced:
            assert announced.recv(100).startswith(b"HTTP/1.1 413 ")
        with raw(url, POST + "Transfer-Encoding: chunked\n\n") as streaming:
            streaming.sendall(b"800\r\n" + b" " * 2048 + b"\r\n")  # and more would follow
            assert streaming.recv(100).startswith(b"HTTP/1.1 413 ")
        with raw(url, POST + "Content-Length: nought\n\n") as malformed:
            assert malformed.recv(100).startswith(b"HTTP/1.1 400 ")


def test_connections_that_never_end_their_request_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(http_guard, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(http_guard, "DRAIN_SECONDS", 0.1)
    with served() as url:
        opened = [raw(url, ""), raw(url, "GET / HTTP/1.1\nX-A: "), raw(url, POST + "Content-Length: 100\n\n{")]
        answered = raw(url, "GET / HTTP/1.1\nHost: localhost\n\n")
        assert answered.recv(1000).startswith(b"HTTP/1.1 200 ")
        answered.sendall(b"GET / HTTP/1.1\r\nX-A: ")  # a second request on the same connection
        began = time.monotonic()
        ends = [_rest(connection) for connection in [*opened, answered]]
        assert time.monotonic() - began < 5
        assert [end[:13] for end in ends[:3]] == [b"", b"", b"HTTP/1.1 408 "]
        assert b"HTTP" not in ends[3]  # no more than the rest of the first answer
        assert requests.get(url, timeout=20).status_code == 200


def _rest(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    found = bytearray()
    with suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            found += part
    return bytes(found)


def test_connections_that_leave_their_answer_unread_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Talkative(Red):
        def describe(self) -> dict[str, Any]:
            return {"model": "x" * 20_000_000}

    monkeypatch.setattr(http_guard, "ANSWER_SECONDS", 0.2)
    with served(scorer=Talkative(Settings())) as url, raw(url, "GET / HTTP/1.1\nHost: localhost\n\n") as connection:
        time.sleep(0.5)
        assert len(_rest(connection)) < 20_000_000


def test_connections_beyond_the_limit_are_told_to_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "MAX_CONNECTIONS", 2)
    with served() as url:
        kept = [raw(url, "GET / HTTP/1.1\nX-A: ") for _ in range(2)]
        with raw(url, "") as third:
            assert third.recv(1000).startswith(b"HTTP/1.1 503 ")
        for connection in kept:
            connection.close()
        assert remote(url, wait=0.1, retries=3).score([picture(3)], ["x"]).tolist() == [3]


class Gate(Red):
    """Scores once it is let to, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(Settings())
        self.asked: list[str] = []
        self.open = threading.Event()

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        self.asked += prompts
        self.open.wait(20)
        return super().score(images, prompts)


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_the_queue_is_bounded_holds_bodies_alone_and_forgets_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    unfolded: list[bytes] = []
    queues: list[http_guard.Queue] = []

    def decode(data: bytes, formats: tuple[str, ...]) -> Image.Image:
        unfolded.append(data)
        return decode_image(data, formats)

    def queue(length: int) -> http_guard.Queue:
        queues.append(made(length))
        return queues[-1]

    made = http_guard.Queue
    monkeypatch.setattr(http_guard, "Queue", queue)
    monkeypatch.setattr(serving, "decode_image", decode)
    gate = Gate()
    scores: dict[int, list[float]] = {}

    def ask(red: int) -> None:
        scores[red] = remote(url, timeout=60.0, wait=0.05).score([picture(red)], [f"prompt {red}"]).tolist()

    with served(scorer=gate, queue=2) as url:
        threads = [threading.Thread(target=ask, args=(red,), daemon=True) for red in (1, 2)]
        threads[0].start()
        until(lambda: gate.asked == ["prompt 1"])
        threads[1].start()
        until(lambda: queues[0].inside == 2)
        body = ScoreRequest(prompts=["x" * 100_000], images=[png(picture(1))]).model_dump_json()
        with pytest.raises(requests.Timeout):
            requests.post(f"{url}/score", data=body, headers=JSON, timeout=0.2)
        assert queues[0].inside == 3
        answer = requests.post(f"{url}/score", data=body, headers=JSON, timeout=20)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert len(unfolded) == 1  # of the one whose turn it is
        threads.append(threading.Thread(target=ask, args=(3,), daemon=True))  # is told to come later, and does
        threads[2].start()
        time.sleep(0.1)
        gate.open.set()
        for thread in threads:
            thread.join(20)
    assert scores == {1: [1], 2: [2], 3: [3]}
    assert gate.asked == ["prompt 1", "prompt 2", "prompt 3"]  # nobody waits for the long one


def test_a_failing_scorer_tells_no_traceback() -> None:
    class Bad(Red):
        def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
            raise OSError("two\nlines with https://me:secret@host/ and " + "x" * 10_000)

        def describe(self) -> dict[str, Any]:
            raise RuntimeError("no device")

    with served(scorer=Bad(Settings())) as url:
        body = ScoreRequest(prompts=["a"], images=[png(picture(1))]).model_dump_json()
        answer = requests.post(f"{url}/score", data=body, headers=JSON, timeout=20)
        assert (answer.status_code, list(answer.json())) == (500, ["error"])
        assert answer.json()["error"].startswith(r"OSError: two\nlines with https://***@host/ and xxx")
        assert len(answer.json()["error"]) < 2100
        assert requests.get(url, timeout=20).json() == {"error": "RuntimeError: no device"}


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
    with served(scorer=Late(Settings())) as url, pytest.raises(RunError, match="it took too long, 1 try"):
        remote(url, timeout=0.1, retries=0).score([picture(1)], ["x"])


@contextmanager
def speaking(*answers: bytes, pause: float = 0.0, times: int = 1) -> Iterator[tuple[str, list[bytes]]]:
    """The URL of a server that sends these bytes to whatever it is asked, with a pause after each, and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak() -> None:
            for _ in range(times):
                connection, _ = listening.accept()
                with connection, suppress(OSError):
                    asked.append(connection.recv(2**16))
                    for part in answers:
                        connection.sendall(part)
                        time.sleep(pause)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        thread.join(20)


OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
SLOWLY = [OK, *[b"X-A: b\r\n"] * 12]


@pytest.mark.parametrize("parts", [SLOWLY, [OK + b"\r\n", *[b" "] * 12]], ids=["header", "body"])
def test_a_request_has_one_deadline_however_its_answer_comes(parts: list[bytes]) -> None:
    """Each byte comes well before the timeout of a socket."""
    with speaking(*parts, pause=0.05) as (url, _):
        began = time.monotonic()
        with pytest.raises(RunError, match="it took too long, 1 try"):
            remote(url, timeout=0.2, retries=0).prepare()
        assert time.monotonic() - began < 0.5


def test_an_answer_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_RESPONSE", 1000)
    with (
        speaking(OK + b"\r\n" + b" " * 1001) as (url, _),
        pytest.raises(RunError, match="answers with more than 1000 bytes"),
    ):
        remote(url).prepare()


def test_what_is_compressed_is_not_unfolded() -> None:
    bomb = gzip.compress(b" " * 10**6)
    with speaking(OK + b"Content-Encoding: gzip\r\n\r\n" + bomb) as (url, asked):
        with pytest.raises(RunError, match="answers, but not as a scorer"):
            remote(url).prepare()
        assert b"Accept-Encoding: identity" in asked[0]


def test_redirects_are_named_and_not_followed() -> None:
    with speaking(b"") as (elsewhere, followed):
        moved = f"HTTP/1.1 307 x\r\nContent-Length: 0\r\nLocation: {elsewhere}/score\r\n\r\n".encode()
        with speaking(moved) as (url, _), pytest.raises(UserError, match=f"redirects to {elsewhere}; set the URL"):
            remote(url).prepare()
        assert followed == []
        raw(elsewhere, "").close()  # for which it waits


def test_this_machine_is_never_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with served() as url:
        assert remote(url).score([picture(3)], ["x"]).tolist() == [3]
        assert remote(url.replace("127.0.0.1", "localhost")).score([picture(3)], ["x"]).tolist() == [3]


def test_a_proxy_between_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with speaking(b"HTTP/1.1 403 x\r\nContent-Length: 6\r\nConnection: close\r\n\r\ndenied") as (proxy, asked):
        monkeypatch.setenv("http_proxy", proxy.replace("//", "//me:secret@"))
        with pytest.raises(UserError, match=r"scorer\.example refuses: HTTP 403 .*proxy 127\.0\.0\.1:\d+.*NO_PROXY=") as told:
            remote("http://scorer.example").prepare()
    assert asked[0].startswith(b"GET http://scorer.example/ ")
    assert "secret" not in str(told.value)
    with pytest.raises(RunError, match=r"does not answer \(ProxyError, 1 try\) \(through the proxy"):
        remote("http://scorer.example", retries=0).prepare()  # the proxy is gone


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificate")
def test_certificates_are_verified(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("key.pem", "certificate.pem")]
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost"]
    made = ["openssl", "req", "-x509", *options, "-keyout", files[0], "-out", files[1]]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak() -> None:
            with suppress(OSError):
                context.wrap_socket(listening.accept()[0], server_side=True)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        port = listening.getsockname()[1]
        with pytest.raises(RunError, match=r"does not answer \(TLS: .*certificate verify failed"):
            remote(f"https://localhost:{port}", retries=0).prepare()
        thread.join(20)


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
