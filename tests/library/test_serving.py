"""A library served by HTTP: its answers, its limits, and the command on a real socket."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import small
from ficpd.errors import ConfigError
from ficpd.library.serving import Limits, create_app, serve
from ficpd.library.session import LibrarySession, load_library

TEXTS = ["the film was lovely", "awful and grey ü"]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> LibrarySession:
    folder = tmp_path_factory.mktemp("served")
    small.run(folder, "fedavg")
    return load_library(folder / "run")


class Client:
    """Asks the application without a socket."""

    def __init__(self, app: FastAPI):
        self.app = app

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def request() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://app") as client:
                return await client.request(method, path, **more)

        return asyncio.run(request())

    def get(self, path: str) -> httpx.Response:
        return self.ask("GET", path)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return self.ask("POST", path, **more)


@pytest.fixture(scope="module")
def client(library) -> Client:
    return Client(create_app(library, Limits(texts=3, characters=200)))


def test_it_answers_as_predict_does(client, library):
    answer = client.post("/predict", json={"texts": TEXTS})
    assert answer.status_code == 200
    found = answer.json()
    assert (found["task"], found["prompt"]) == ("classification", "global")
    frame = library.predict(TEXTS, scores=True)
    assert [one["prediction"] for one in found["predictions"]] == list(frame["label"])
    for one, row in zip(found["predictions"], frame.to_dict("records"), strict=True):
        assert one["scores"] == pytest.approx({label: row[label] for label in small.LABELS}, abs=1e-6)


def test_it_tells_its_health_and_its_schema(client, library):
    health = client.get("/healthz").json()
    assert (health["status"], health["backbone"], health["prompts"]) == ("ok", "tiny", ["global"])
    schema = client.get("/openapi.json").json()
    assert {"/predict", "/healthz"} <= schema["paths"].keys()
    assert schema["components"]["schemas"]["Texts"]["properties"]["texts"]["maxItems"] == 3
    assert client.get("/docs").status_code == 404


@pytest.mark.parametrize(("asked", "told"), [
    ({"texts": ["a"] * 4}, "texts: List should have at most 3 items"),
    ({"texts": ["a" * 201]}, "texts.0: String should have at most 200 characters"),
    ({"texts": [" "]}, "texts.0"),
    ({"texts": []}, "texts"),
    ({"text": "a"}, "texts: Field required"),
    ({"texts": ["a"], "promt": "global"}, "promt"),
    ({"texts": ["a"], "prompt": "globl"}, "no prompt 'globl'"),
    ({"texts": ["a"], "task": "mood"}, "unknown task 'mood'"),
])  # fmt: skip
def test_a_wrong_request_is_a_sentence(client, asked, told):
    answer = client.post("/predict", json=asked)
    assert answer.status_code == 422
    assert told in answer.json()["error"]


def test_a_large_body_is_refused_before_it_is_read(client):
    limit = Limits(texts=3, characters=200).body
    answer = client.post("/predict", content=b"x" * (limit + 1))
    assert answer.status_code == 413
    assert str(limit) in answer.json()["error"]
    whole = json.dumps({"texts": ["\U0001f600" * 200] * 3})  # each character as two escapes
    assert client.post("/predict", content=whole, headers={"content-type": "application/json"}).status_code == 200

    async def parts() -> AsyncIterator[bytes]:
        yield b"{}"

    assert client.post("/predict", content=parts()).status_code == 411


def test_an_address_in_use_is_an_error(library):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            serve(library, "127.0.0.1", port, Limits(), print)


@pytest.mark.slow
def test_the_command_answers_on_a_socket_until_it_is_stopped(library):
    command = [sys.executable, "-u", "-m", "ficpd", "serve", str(library.folder), "--port", "0", "--max-texts", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().partition(" at ")[2].split()[0]
            assert httpx.get(f"{address}/healthz", timeout=60).json()["status"] == "ok"
            answer = httpx.post(f"{address}/predict", json={"texts": TEXTS}, timeout=60).json()
            assert [one["prediction"] for one in answer["predictions"]] == library.predict(TEXTS)
            assert httpx.post(f"{address}/predict", json={"texts": ["a"] * 3}, timeout=60).status_code == 422
        finally:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130, -signal.SIGINT)
    assert "Traceback" not in err


def test_without_its_packages_the_command_is_one_sentence(ficpd, library, monkeypatch):
    monkeypatch.delitem(sys.modules, "ficpd.library.serving")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    err = ficpd("serve", Path(str(library.folder))).said(1)
    assert "ficpd serve needs the package uvicorn" in err
    assert "pip install 'ficpd[serve]'" in err
    assert err.count("\n") == 1
