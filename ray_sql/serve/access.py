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
NO_TOKEN = (
    f"{TOKEN} is set where the service was started, and not on a node where a copy of the model "
    "starts; set it in the environment of every node's Ray"
)
"""The error of a copy of the model that would ask nobody for the token."""


def is_local(host: str) -> bool:
    """Tell whether an address is reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def token_for(host: str, needed: bool = False) -> str | None:
    """Return the bearer token of the environment.

    Raises `ConfigError` if there is none, and it is `needed`, or others reach the address.
    """
    token = os.environ.get(TOKEN, "").strip() or None
    if token is None and needed:
        raise ConfigError(NO_TOKEN)
    if token is None and not is_local(host):
        raise ConfigError(
            f"--serve.host {host}: others reach it, so set {TOKEN} in the environment, which they "
            "send as a bearer token; or listen on 127.0.0.1"
        )
    return token


class Door:
    """Refuses requests without the token, and those whose body is too large or of unknown size.

    Without a token only this machine may ask. Where the service listens does not matter: on a
    cluster, Ray Serve may have been told another address than our settings have.
    """

    def __init__(self, app: ASGIApp, token: str | None, most_bytes: int) -> None:
        self._app, self._token, self._most_bytes = app, token, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if self._token is None:
            if refusal := _refuse_stranger(scope, headers):
                return refusal
        elif scope["path"] not in OPEN and not self._may_enter(headers, self._token):
            return error(401, "give the token: Authorization: Bearer …")
        if "transfer-encoding" in headers:
            return error(411, "give the size of the body: Content-Length")
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > self._most_bytes:
            return error(413, f"a body has at most {self._most_bytes} bytes")
        return None

    def _may_enter(self, headers: Headers, token: str) -> bool:
        given = headers.get("authorization", "").encode()
        return hmac.compare_digest(given, f"Bearer {token}".encode())


def _refuse_stranger(scope: Scope, headers: Headers) -> JSONResponse | None:
    """Refuse who is not on this machine, or was led here by a page that calls it otherwise."""
    client, _ = scope.get("client") or ("", 0)
    if not is_local(client):
        return error(403, f"only its own machine may ask a service that has no {TOKEN}")
    if not is_local(_without_port(headers.get("host", ""))):
        return error(400, f"ask 127.0.0.1 or localhost; for another name, set {TOKEN}")
    return None


def _without_port(host: str) -> str:
    """Return the name or address of a Host header."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def error(status: int, message: str, **headers: str) -> JSONResponse:
    """Return an error as OpenAI's clients read it; half characters in it are replaced."""
    message = message.encode(errors="replace").decode()
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)
