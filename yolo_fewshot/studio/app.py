"""The application that serves the page of a studio."""

from __future__ import annotations

import secrets
import socket
import threading
import warnings
import webbrowser
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse
from nicegui import app, ui
from ultralytics.utils import LOGGER

from yolo_fewshot.studio.live import Live
from yolo_fewshot.studio.page import RESULTS, Page
from yolo_fewshot.studio.server import Guard

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def make_app(live: Live, token: str, once: str | None = None) -> Guard:
    """Return the application that serves a studio.

    Args:
        live (Live): The studio.
        token (str): First part of every path.
        once (str, optional): Path that leads to the page the first time.

    Returns:
        (Guard): An ASGI application.
    """
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    project = live.studio.project

    @ui.page("/", title="Few-shot Studio")
    def page() -> None:
        Page(live, f"/{token}")

    @app.get("/image/{key}")
    def image(key: str) -> FileResponse:
        return _file(project.path(project.images[key]) if key in project.images else None)

    @app.get("/thumb/{key}")
    def thumb(key: str) -> FileResponse:
        return _file(project.thumb(key) if key in project.images else None)

    @app.get("/exports/{name}")
    def export(name: str) -> FileResponse:
        return _file(live.exports / name if name in {x[0] for x in RESULTS.values()} else None)

    ui.run_with(outer, mount_path=f"/{token}", title="Few-shot Studio", show_welcome_message=False, favicon="🎯")
    return Guard(outer, token, once)


def _file(path: Path | None) -> FileResponse:
    """Return a file, or raise a 404."""
    if path is None or not path.is_file():
        raise HTTPException(404)
    return FileResponse(path)


def serve(live: Live, host: str = "127.0.0.1", port: int = 0, show: bool = True) -> None:
    """Serve a studio until it is interrupted.

    Args:
        live (Live): The studio.
        host (str): Address to listen at.
        port (int): Port, 0 for a free one.
        show (bool): Whether to open the page in the browser.

    Raises:
        ValueError: If the port is in use, or the address is not one of this machine.
    """
    token, once = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # from now on a browser waits instead of failing
    except (OSError, OverflowError) as e:
        listener.close()
        raise ValueError(f"host={host} port={port} cannot be used: {e}. Name another port, or none.") from e
    shown = f"[{host}]" if ":" in host else host
    root = f"http://{shown}:{listener.getsockname()[1]}"
    if host not in LOOPBACK:
        LOGGER.warning(
            f"host={host}: whoever can reach this address, and learns the URL below, can see and change the project. "
            "The connection is not encrypted."
        )
    print(f"Few-shot Studio: {root}/{token}/")
    print(f"Press Ctrl+C to end; everything is saved in {live.studio.project.folder}.", flush=True)
    server = uvicorn.Server(uvicorn.Config(make_app(live, token, once), log_level="warning", ws_max_size=2**24))
    if show:
        # A browser in the terminal ends only after the server has started.
        threading.Thread(target=webbrowser.open, args=(f"{root}/{once}",), daemon=True, name="studio browser").start()
    # NiceGUI looks at every object of the process, of which PyTorch has some that warn.
    warnings.filterwarnings("ignore", ".*torch.distributed.reduce_op", FutureWarning)
    level = LOGGER.level
    LOGGER.setLevel("WARNING")  # no progress bar for every image
    try:
        with suppress(KeyboardInterrupt):  # which uvicorn raises again after its end
            server.run(sockets=[listener])
    finally:
        LOGGER.setLevel(level)
