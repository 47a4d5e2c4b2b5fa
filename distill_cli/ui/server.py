"""The process of `distill ui`: listen on this machine alone, and serve until Ctrl-C."""

import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import uvicorn

from distill_cli.errors import ConfigError
from distill_cli.ui.app import make_app
from distill_cli.ui.listing import Listing

HOST = "127.0.0.1"
STOP_S = 2
"""How long answers that are being sent may take when the server is stopped."""


def serve(root: Path, *, port: int, opens_browser: bool) -> None:
    """Serve the page about the runs below a folder until Ctrl-C.

    Args:
        port: 0 is any that is free.

    Raises:
        ConfigError: the port is not free.
    """
    with suppress(KeyboardInterrupt), _bind(port) as listener:
        port = listener.getsockname()[1]
        address = f"http://{HOST}:{port}/"
        print(f"{root}: {address} (Ctrl-C ends it)", flush=True)
        if opens_browser and has_display(os.environ):
            threading.Thread(target=_open, args=(address,), daemon=True).start()
        app = make_app(Listing(root), port=port)
        config = uvicorn.Config(
            app, lifespan="off", ws="none", log_level="error", access_log=False, server_header=False,
            timeout_graceful_shutdown=STOP_S,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listener])


def _bind(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port), backlog=64)
    except OSError as error:
        what = f"--port {port}: cannot listen there ({os.strerror(error.errno or 0)})"
        raise ConfigError(f"{what}; give another, or 0 for any that is free") from error


def has_display(environment: Mapping[str, str]) -> bool:
    """Return whether a browser would open in a window: one in this terminal would take it over."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    return sys.platform == "darwin" or any(environment.get(name) for name in names)


def _open(address: str) -> None:
    with suppress(webbrowser.Error):
        webbrowser.open(address)
