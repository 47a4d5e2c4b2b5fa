"""The routes of the page.

| route | answer |
|---|---|
| `/` | the list of runs, which `/lines` fills |
| `/lines` | the list's lines as JSON |
| `/report?run=NAME&run=...` | the report about these runs and sweeps |
| `/samples?run=...` | their recorded answers as JSON |
| `/now?run=...` | their state and the version of their report, as JSON |
| `/log?run=...` | the last lines of a run's log |
| `/<file>` | scripts and styles |

A name is one of the list's: its path below the root. An error is a sentence, with status 404 if there is no such run,
500 if a file of the run is damaged.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from distill_cli.errors import DistillError
from distill_cli.report import html
from distill_cli.ui.find import Found
from distill_cli.ui.guard import guarded
from distill_cli.ui.listing import Listing
from distill_cli.ui.pages import Pages

LIST_S = 1.0
"""How long the list waits for runs that are read for the first time."""
FOLDER = Path(__file__).parent
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
FILES: dict[str, Callable[[], str]] = {
    **{name: partial(html.part, name) for name in ("dom.js", "page.css", "page.js")},
    **{name: (FOLDER / name).read_text for name in ("list.html", "list.js", "live.js", "run.js", "ui.css")},
    "vega.js": html.vega,
}


def make_app(listing: Listing, *, port: int) -> ASGIApp:
    """Return the application that shows a listing's runs; `port` is where it is reached."""
    pages = Pages(listing)
    template = html.templates(html.FOLDER, FOLDER).get_template("run.html")

    def show_list(request: Request) -> Response:
        return _answer(request, FILES["list.html"](), "text/html")

    def show_lines(request: Request) -> Response:
        lines = [vars(line) for line in listing.lines(within_s=LIST_S)]
        return _json(request, {"root": str(listing.root), "lines": lines})

    def show_report(request: Request) -> Response:
        chosen = choose(request)
        shown, query = pages.show(chosen), "&".join(found.query for found in chosen)
        versions, now = shown.versions, pages.now(chosen)
        text = template.render(shown.words, data=shown.data, query=query, versions=versions, now=now, chosen=chosen)
        return _answer(request, text, "text/html")

    def show_samples(request: Request) -> Response:
        return _answer(request, pages.show(choose(request)).answers, "application/json")

    def show_now(request: Request) -> Response:
        return _json(request, pages.now(choose(request)))

    def show_log(request: Request) -> Response:
        return _answer(request, pages.log(choose(request)), "text/plain")

    def choose(request: Request) -> list[Found]:
        return [_find(listing, name) for name in dict.fromkeys(run_names(request.url.query)) or ("",)]

    routes = {
        "/": show_list, "/lines": show_lines, "/report": show_report, "/samples": show_samples, "/now": show_now,
        "/log": show_log, "/{file}": _show_file,
    }  # fmt: skip
    handlers = {DistillError: _failed, HTTPException: _failed}
    app = Starlette(routes=[Route(path, show) for path, show in routes.items()], exception_handlers=handlers)
    app.router.redirect_slashes = False
    return guarded(app, port)


def run_names(query: str) -> list[str]:
    """Return the names of runs in the query of an address, whatever bytes their folders are named by."""
    values = [part.removeprefix("run=") for part in query.split("&") if part.startswith("run=")]
    return [os.fsdecode(unquote_to_bytes(value)) for value in values]


def _find(listing: Listing, name: str) -> Found:
    if (found := listing.find(name)) is None:
        raise HTTPException(404, "there is no such run, or it has not begun")
    return found


@cache
def _file(name: str) -> str:
    return FILES[name]()


def _show_file(request: Request) -> Response:
    name = request.path_params["file"]
    if name not in FILES:
        raise HTTPException(404, "no such page")
    return _answer(request, _file(name), TYPES[Path(name).suffix])


def _json(request: Request, value: Any) -> Response:
    return _answer(request, json.dumps(value, allow_nan=False), "application/json")


def _answer(request: Request, text: str, media_type: str) -> Response:
    """Return an answer, without its text if the browser has it."""
    body = text.encode(errors="replace")  # names of folders may be no text
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"ETag": tag})
    return Response(body, media_type=f"{media_type}; charset=utf-8", headers={"ETag": tag})


def _failed(request: Request, error: Exception) -> Response:
    status, text = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
    return PlainTextResponse((text + "\n").encode(errors="replace"), status)
