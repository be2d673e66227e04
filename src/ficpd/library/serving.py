"""Serves a library by HTTP, with its backbone in memory.

    GET  /healthz        200 once the backbone is loaded
    POST /predict        texts to predictions, with a score for each label
    GET  /openapi.json   the schema

Errors are JSON `{"error"}`. There is no authentication: serve on the loopback address, or behind a proxy that has it.
"""

import socket
from collections.abc import Awaitable, Callable
from threading import Lock
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ficpd import __version__
from ficpd.errors import ConfigError, FicpdError, LibraryError
from ficpd.library.answers import answer
from ficpd.library.session import LibrarySession, default_prompt, get_prompt
from ficpd.types import Record

WAITING = 64
"""The maximum number of concurrent requests; others are answered with 503."""
SPARE_BYTES = 4096
"""The bytes that a request body may have besides its texts."""
BYTES_PER_CHARACTER = 12
"""The most bytes of a character in JSON: two escapes of six."""


class Limits(BaseModel):
    """The maximum number of texts in a request, and of characters in a text."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    texts: int = Field(default=64, ge=1)
    characters: int = Field(default=10_000, ge=1)

    @property
    def body(self) -> int:
        """Returns the maximum size of a request body in bytes."""
        return self.texts * (BYTES_PER_CHARACTER * self.characters + 4) + SPARE_BYTES


class Prediction(BaseModel):
    prediction: str | float
    scores: dict[str, float] | None = Field(None, description="the probability of each label; null without labels")


class Predictions(BaseModel):
    task: str
    prompt: str
    predictions: list[Prediction]


class Health(BaseModel):
    status: str
    version: str
    backbone: str
    prompts: list[str]
    tasks: list[str]


class Failure(BaseModel):
    error: str


def create_app(opened: LibrarySession, limits: Limits) -> FastAPI:
    """Makes the application of a library. Raises `LibraryError` if its backbone takes no texts."""
    backbone, lock = opened.model.backbone, Lock()
    if backbone.modality != "text":
        raise LibraryError(f"{backbone.name} takes images, and only texts are served; use `ficpd predict`")
    app = FastAPI(title="ficpd", version=__version__, docs_url=None, redoc_url=None)  # its pages load external scripts
    text = Annotated[str, StringConstraints(min_length=1, max_length=limits.characters, pattern=r"\S")]

    class Texts(BaseModel):
        model_config = ConfigDict(extra="forbid")
        texts: list[text] = Field(min_length=1, max_length=limits.texts)  # type: ignore[valid-type]
        task: str | None = Field(None, description="which task, if the library has several")
        prompt: str | None = Field(None, description="a prompt's name; null: adapted, else global")

    @app.middleware("http")
    async def bound(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        """Refuses a body that is too large before it is read."""
        length = request.headers.get("content-length")
        if request.method == "POST" and (length is None or not length.isdigit()):
            return _failed(411, "expected the header Content-Length")
        if length is not None and int(length) > limits.body:
            return _failed(413, f"a request has at most {limits.body} bytes; send fewer texts at a time")
        return await call(request)

    @app.exception_handler(FicpdError)
    def refuse(request: Request, error: FicpdError) -> Response:
        return _failed(422, str(error))

    @app.exception_handler(RequestValidationError)
    def explain(request: Request, error: RequestValidationError) -> Response:
        lines = [f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in error.errors()]
        return _failed(422, "; ".join(lines))

    @app.get("/healthz")
    def healthz() -> Health:
        """Names the loaded backbone, the prompts and the tasks."""
        return Health(
            status="ok", version=__version__, backbone=backbone.name, prompts=list(opened.library.prompts),
            tasks=list(opened.tasks),
        )  # fmt: skip

    @app.post("/predict", responses={status: {"model": Failure} for status in (411, 413, 422, 503)})
    def predict(asked: Texts) -> Predictions:  # type: ignore[valid-type]
        """Predicts each text by the named prompt, else by `default_prompt`."""
        given: Any = asked
        records = [Record(f"text {place}", {"text": one}) for place, one in enumerate(given.texts, 1)]
        with lock:  # the engine answers one call at a time
            prompt, task = given.prompt or default_prompt(opened, given.task), opened.named(given.task)
            found = answer(opened, records, prompt, task)
        return Predictions(
            task=task, prompt=str(prompt), predictions=[Prediction(prediction=p, scores=s) for p, s in found]
        )

    return app


def _failed(status: int, error: str) -> Response:
    return JSONResponse({"error": error}, status)


def serve(opened: LibrarySession, host: str, port: int, limits: Limits, ready: Callable[[str], None]) -> None:
    """Answers requests until SIGTERM or Ctrl-C. `ready` gets the address once the backbone has answered a text.

    Raises `ConfigError` if the address cannot be bound.
    """
    app = create_app(opened, limits)
    prompt, task = next(iter(opened.library.prompts), None), next(iter(opened.tasks))
    get_prompt(opened.library, prompt)
    answer(opened, [Record("warm", {"text": "warm"})], prompt, task)
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", limit_concurrency=WAITING)
    with _bound(host, port) as sock:
        at = sock.getsockname()
        ready(f"http://{f'[{at[0]}]' if ':' in at[0] else at[0]}:{at[1]}")
        uvicorn.Server(config).run(sockets=[sock])


def _bound(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} cannot be served: {error}; choose another --host or --port") from error
