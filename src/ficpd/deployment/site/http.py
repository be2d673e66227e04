"""Serves the site by HTTP on a Unix socket of mode 0600, or on a socket that systemd passes.

    POST /train, /query   a call (`codec.encode_call`)   200 answer; 428 spec missing; 409 refused; 422 unreadable; 500

Callers are not trusted. The owner reads the site's status from its state folder. Errors are JSON `{"error", "refused"}`. A
body above `LARGEST` is refused with 413 before all of it is read; one that does not end, with 408.
"""

import asyncio
import os
import signal
import socket
import stat
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from ficpd.deployment.site.site import Site, SpecMissingError
from ficpd.errors import BudgetError, CodecError, PolicyError, SiteError

LARGEST = 64 << 20
"""The maximum bytes of a call. A prompt of 500 tokens of width 8192 has 16 MiB."""
SECONDS_OF_SILENCE = 30
"""The maximum time for a request to arrive, and until the next one arrives."""
FIRST_HANDED_OVER = 3
"""systemd's SD_LISTEN_FDS_START."""


def create_app(site: Site) -> FastAPI:
    app = FastAPI(title="ficpd site", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/train")
    @app.post("/query")
    async def call(request: Request) -> Response:
        try:
            body = await _body(request)
        except ClientDisconnect:
            return JSONResponse({"error": "the call did not end", "refused": False}, 408)
        if body is None:
            return JSONResponse({"error": f"a call has at most {LARGEST} bytes", "refused": False}, 413)
        return await run_in_threadpool(handle_call, site, body)

    return app


class ImpatientProtocol(H11Protocol):
    """Closes a connection whose request does not end in time. Else such connections would reach uvicorn's limit."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(SECONDS_OF_SILENCE, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._deadline.cancel()
        self._deadline = self.loop.call_later(SECONDS_OF_SILENCE, self._give_up)
        super().on_response_complete()

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.more_body or self.cycle.response_complete:
            self.transport.close()


def handle_call(site: Site, body: bytes) -> Response:
    """Returns the site's answer, or an error as JSON."""
    try:
        return Response(site.handle(body), media_type="application/octet-stream")
    except SpecMissingError:
        return JSONResponse({"error": "this site does not have the run's spec", "refused": False}, 428)
    except Exception as error:  # no error may end the site
        refused = isinstance(error, (PolicyError, BudgetError))
        kind = 409 if refused else 422 if isinstance(error, CodecError) else 500
        return JSONResponse({"error": site.public_error(error), "refused": refused}, kind)


async def _body(request: Request) -> bytes | None:
    """Reads the body. Returns None if it, or its header Content-Length, is too large."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > LARGEST:
        return None
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST:
            return None
        parts.append(part)
    return b"".join(parts)


def serve(site: Site) -> None:
    """Answers calls until SIGTERM or Ctrl-C. Finishes the current call first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again after it has stopped
    given = systemd_socket()
    sock = given or bind_socket(site.config.socket)
    site.say(f"answers on {'the socket it was handed' if given else site.config.socket}")
    try:
        server_of(site).run(sockets=[sock])
    finally:
        site.close()
        if not given:
            sock.close()
            site.config.socket.unlink(missing_ok=True)


def server_of(site: Site) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            create_app(site), log_level="warning", access_log=False, lifespan="off", ws="none", limit_concurrency=64,
            http=ImpatientProtocol,
            timeout_keep_alive=SECONDS_OF_SILENCE, timeout_graceful_shutdown=600,
        )
    )  # fmt: skip


def systemd_socket() -> socket.socket | None:
    """Returns the socket that systemd opened (`ficpd-site.socket`); its unit sets owner and mode."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    return socket.socket(fileno=FIRST_HANDED_OVER)


def bind_socket(path: Path) -> socket.socket:
    """Creates a socket of mode 0600. Replaces a dead process's socket; raises `SiteError` for any other file."""
    if not path.parent.is_dir():
        raise SiteError(f"there is no folder {path.parent} for the socket; make it, or set another `socket`")
    if path.is_symlink() or path.exists():
        _take_away(path)
    sock, before = socket.socket(socket.AF_UNIX), os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise SiteError(f"the socket {path} cannot be made: {error.strerror}; may this user write there?") from error
    finally:
        os.umask(before)
    sock.listen(64)
    return sock


def _take_away(path: Path) -> None:
    about = path.lstat()
    if not stat.S_ISSOCK(about.st_mode):
        raise SiteError(f"{path} is there and is no socket; move it away, or set another `socket`")
    if about.st_uid != os.geteuid():
        raise SiteError(
            f"the socket {path} belongs to user {about.st_uid}, this process is user {os.geteuid()}; set another `socket`, "
            "or have its owner remove it"
        )
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise SiteError(f"another process answers on {path}; stop it first (`ficpd site status` names it)")
