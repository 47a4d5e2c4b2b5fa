"""Refuse requests that do not come from the page itself, and tell the browser what the page may do.

Any page that is open in the same browser can send requests to a server on this machine, and a name that its owner
points to 127.0.0.1 makes it the same origin (DNS rebinding). So the Host header must name this machine, and the request
must not come from another origin. A link to the page is no such request: it is opened, in a context of its own.
"""

from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD")
NAMES = ("127.0.0.1", "localhost", "[::1]")
REFUSED_ESCAPES = (b"%2f", b"%00")
"""Escapes of a slash and of a null byte, which no address of the page has."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),  # Vega writes style attributes and elements
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def guarded(app: ASGIApp, port: int) -> ASGIApp:
    """Return an application that refuses requests from elsewhere; `port` is where it is reached."""
    hosts = {f"{name}:{port}" for name in NAMES} | (set(NAMES) if port == 80 else set())

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (refusal(scope, hosts) or app)(scope, receive, send_guarded)

    return call


def refusal(scope: Scope, hosts: set[str]) -> Response | None:
    """Return the answer to a request that is refused; None if it is not."""
    if scope["method"] not in METHODS:
        return _answer(405, "this page only shows runs: GET and HEAD", {"Allow": ", ".join(METHODS)})
    headers = Headers(scope=scope)
    if len(named := headers.getlist("host")) != 1 or named[0].lower() not in hosts:
        return _answer(403, f"the address of this page is one of {', '.join(sorted(hosts))}; see docs/ui.md")
    if "origin" in headers and headers["origin"].lower() not in {f"http://{host}" for host in hosts}:
        return _answer(403, "requests of other pages are refused")
    is_visit = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not is_visit:
        return _answer(403, "requests of other pages are refused")
    typed = (scope["raw_path"] + b"?" + scope["query_string"]).lower()
    if any(escape in typed for escape in REFUSED_ESCAPES):
        return _answer(404, "no such page")
    return None


def _answer(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    return PlainTextResponse(sentence + "\n", status, headers)
