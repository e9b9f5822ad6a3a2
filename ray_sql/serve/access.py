"""Who may ask, and how much: the token, the host, and the size of a request."""

from __future__ import annotations

import hmac
import os
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ray_sql.errors import ConfigError
from ray_sql.serve import page

TOKEN = "RAY_SQL_TOKEN"
"""The environment variable with the bearer token."""
OPEN = {"/healthz", *page.FILES}
"""Paths that need no token: the page asks for it."""
LOCAL_HOSTS = ["localhost", "127.0.0.1"]
"""Names by which this machine is asked. Another name is a page that leads a browser here."""


def is_local(host: str) -> bool:
    """Tell whether an address is reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_for(host: str) -> str | None:
    """Return the bearer token of the environment.

    Raises `ConfigError` if there is none, and others reach the address.
    """
    token = os.environ.get(TOKEN, "").strip() or None
    if token is None and not is_local(host):
        raise ConfigError(
            f"--serve.host {host}: others reach it, so set {TOKEN} in the environment, which they "
            "send as a bearer token; or listen on 127.0.0.1"
        )
    return token


class Door:
    """Refuses requests without the token, and those whose body is too large or of unknown size."""

    def __init__(self, app: ASGIApp, token: str | None, most_bytes: int) -> None:
        self._app, self._token, self._most_bytes = app, token, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN and not self._may_enter(headers):
            return error(401, "give the token: Authorization: Bearer …")
        if "transfer-encoding" in headers:
            return error(411, "give the size of the body: Content-Length")
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > self._most_bytes:
            return error(413, f"a body has at most {self._most_bytes} bytes")
        return None

    def _may_enter(self, headers: Headers) -> bool:
        given = headers.get("authorization", "").encode()
        return self._token is None or hmac.compare_digest(given, f"Bearer {self._token}".encode())


def error(status: int, message: str, **headers: str) -> JSONResponse:
    """Return an error as OpenAI's clients read it; half characters in it are replaced."""
    message = message.encode(errors="replace").decode()
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)
