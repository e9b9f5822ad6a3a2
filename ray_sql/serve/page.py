"""The page at `/`: three files of the package, which fetch nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""The page's files by path, with their types."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing runs but the page's own script, and no other page may frame it."""


def add_page(app: FastAPI) -> None:
    """Serve the page's files, which hold nothing private, to anybody."""
    for path, (name, kind) in FILES.items():
        content = (files("ray_sql.serve") / "web" / name).read_bytes()
        _add(app, path, content, kind)


def _add(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    async def send() -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    app.add_api_route(path, send, methods=["GET"], include_in_schema=False)
