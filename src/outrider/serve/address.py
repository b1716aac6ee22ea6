"""Where a server listens, and whether others may reach it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sized

from outrider.errors import ConfigError

BACKLOG = 2048
"""Connections that may wait to be taken."""


def check_address(host: str, keys: Sized, allow_open: bool) -> None:
    """ConfigError for an address others can reach without a key, unless that was asked for."""
    if len(keys) or allow_open or is_loopback(host):
        return
    raise ConfigError(
        f"{host} can be reached by others: set an API key (OUTRIDER_API_KEY or --api-key-file), "
        "or say --allow-open if everybody may use this server"
    )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int, backlog: int = BACKLOG) -> socket.socket:
    """A socket that listens and does not block. ConfigError if the address cannot be had."""
    name = host.strip("[]")
    try:
        family = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((name, port), family=family, backlog=backlog)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port"
        ) from None
    listener.setblocking(False)
    return listener
