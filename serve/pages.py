"""A chat page for the browser, at `/`: plain files that ask for nothing from elsewhere."""

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# All files have the path "/", the one that needs no API key; the query selects one.
_INDEX = ("index.html", "text/html")
_OTHERS = {"chat.css": ("chat.css", "text/css"), "chat.js": ("chat.js", "text/javascript")}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def _page(http: Request) -> Response:
    name, media_type = _OTHERS.get(http.url.query, _INDEX)
    content = resources.files("v4jax_serve").joinpath("page", name).read_bytes()
    return Response(content, headers=_HEADERS, media_type=media_type)


ROUTES = [Route("/", _page)]
