"""Ports of this machine that a setting names: free, or refused before anything starts."""

from __future__ import annotations

import socket

from ray_sql.errors import ConfigError


def require_free_port(flag: str, host: str, port: int) -> None:
    """Raise `ConfigError`, which names the flag, for an address that cannot be listened on.

    Ray Serve would share the port of another service of its kind: each would get every other
    request.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{flag} {port}: cannot be listened on at {host} ({error.strerror}); choose "
                "another, or end what has it"
            ) from None
