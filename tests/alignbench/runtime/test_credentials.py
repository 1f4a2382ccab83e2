"""A password or token comes by variable or file, and stands nowhere else."""

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from alignbench import RunError, UserError, load_scorer, run
from alignbench.config.run_config import RunConfig, load_config
from alignbench.errors import holds_secret, redacted
from alignbench.records.environment import command
from alignbench.runtime.credentials import scorer_authorization
from alignbench.settings import ServiceURL, validate
from tests.alignbench.scoring.test_serving import served
from tests.support.plugins import toy_config, write_task

SECRET = "S3CRET"


class Recording(http.server.BaseHTTPRequestHandler):
    """Says what a service says, and keeps what it was authorized by."""

    heard: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.heard.append(self.headers.get("Authorization"))
        self.answer({"protocol": 1, "alignbench": "0", "scorer": "x", "about": {}})

    def do_POST(self) -> None:
        self.heard.append(self.headers.get("Authorization"))
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"scores": [0.5]})

    def answer(self, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def recording() -> Iterator[str]:
    Recording.heard.clear()
    with http.server.HTTPServer(("127.0.0.1", 0), Recording) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def asked(url: str, **settings: Any) -> list[str | None]:
    """By what the two requests of one score were authorized."""
    load_scorer("remote", url=url, retries=0, **settings).score(np.zeros((1, 4, 4, 3), np.uint8), ["x"])
    return list(Recording.heard)


@pytest.mark.parametrize(
    "url",
    [
        *(f"http://me:{SECRET}@host:1", f"https://{SECRET}@host", f"http://host/?token={SECRET}", f"http://host#{SECRET}"),
        *(f"me:{SECRET}@host", f"ftp://me:{SECRET}@host", f"http://me:{SECRET}/x@host", f"http://host:{SECRET}"),
    ],
)
def test_a_url_with_a_password_or_token_is_refused_and_not_shown(url: str, tmp_path: Path) -> None:
    task = write_task(tmp_path)
    task.write_text(task.read_text().replace("tests.support.plugins:Brightness", f"remote, settings: {{url: '{url}'}}"))
    for given in (
        lambda: load_config(options={"scorer_url": url}),
        lambda: load_config(sets=[f"scorer_url={url}"]),
        lambda: validate(RunConfig, {"scorer_url": url}, where="x"),
        lambda: load_scorer("remote", url=url),
    ):
        with pytest.raises(UserError) as caught:
            given()
        assert SECRET not in str(caught.value)
    with pytest.raises(ValidationError):
        TypeAdapter(ServiceURL).validate_python(url)


def test_a_url_without_one_is_taken_as_it_is() -> None:
    for url in ("http://127.0.0.1:8765", "https://host/path/", "http://[::1]:80"):
        assert load_config(options={"scorer_url": url}).scorer_url == url


def test_a_password_in_any_setting_is_refused_and_no_message_shows_one() -> None:
    with pytest.raises(UserError, match=r"backbone\.settings\.x: a password or token in a URL .* ALIGNBENCH_SCORER_TOKEN"):
        validate(RunConfig, {"backbone": {"name": "tiny", "settings": {"x": f"s3://a:{SECRET}@b/c"}}}, where="x")
    for text in (f"see http://a:{SECRET}@b/c, please", f"https://b/c?x=1&api_key={SECRET}&y=2", f"'http://{SECRET}@b'"):
        assert holds_secret(text)
        assert SECRET not in redacted(text)
        assert SECRET not in str(RunError(text))
    for harmless in ("a@b.c", "http://host/a@2x.png", "https://host/c?page=3", "no://"):
        assert not holds_secret(harmless)
    assert redacted("mail a@b, see http://host/c?page=3") == "mail a@b, see http://host/c?page=3"


def test_the_command_in_a_record_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["alignbench", "run", "--scorer-url", f"http://a:{SECRET}@b"])
    assert command() == "alignbench run --scorer-url 'http://***@b'"


def test_a_token_comes_from_a_file_or_else_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNBENCH_SCORER_TOKEN", raising=False)
    assert scorer_authorization() is None
    monkeypatch.setenv("ALIGNBENCH_SCORER_TOKEN", "abc")
    assert scorer_authorization() == "Bearer abc"
    (tmp_path / "token").write_text("Basic dTpw\n")
    assert scorer_authorization(tmp_path / "token") == "Basic dTpw"


@pytest.mark.parametrize("content", [b"", b" \n", b"a\nb", "ä".encode(), b"\xff", b"x" * 20_000])
def test_a_file_that_holds_no_token_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(UserError, match=r"the token file .* (is empty|does not hold a token)"):
        scorer_authorization(tmp_path / "token")
    with pytest.raises(UserError, match=r"cannot read the token file .*: No such file"):
        scorer_authorization(tmp_path / "none")


def test_a_service_gets_the_token_and_never_what_netrc_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.delenv("ALIGNBENCH_SCORER_TOKEN", raising=False)
    with recording() as url:
        assert asked(url) == [None, None]
        monkeypatch.setenv("ALIGNBENCH_SCORER_TOKEN", "abc")
        assert asked(url)[2:] == ["Bearer abc"] * 2
        (tmp_path / "token").write_text("def")
        assert asked(url, token_file="~/token")[4:] == ["Bearer def"] * 2


def test_a_runs_folder_holds_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(SECRET)
    with served() as url:
        config = toy_config(write_task(tmp_path), scorer_url=url, scorer_token_file=tmp_path / "token", iterations=1)
        run(config, tmp_path / "run")
    holding = [file for file in (tmp_path / "run").rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert holding == []
    assert f"scorer_token_file: {tmp_path / 'token'}" in (tmp_path / "run" / "config.yaml").read_text()
