"""The address a server listens on, and whether other machines may reach it."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Sized

from outrider.errors import ConfigError

BACKLOG = 2048
"""Connections that may wait to be accepted."""


def check_address(host: str, keys: Sized, allow_open: bool) -> None:
    """Raise ConfigError for an address that others can reach without a key, unless `allow_open` permits it."""
    if len(keys) or allow_open or is_loopback(host):
        return
    raise ConfigError(
        f"{host} can be reached by others: set an API key (OUTRIDER_API_KEY or --api-key-file), "
        "or use --allow-open if everybody may use this server"
    )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def reserve(host: str, port: int) -> socket.socket:
    """A socket bound to the address that does not listen yet: connections are refused. ConfigError if it cannot be bound."""
    name = host.strip("[]")
    try:
        family, *_, place = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"there is no address {host!r} ({error.strerror or error}): choose another --host") from None
    # the protocol is named because asyncio sends small pieces at once only on sockets of IPPROTO_TCP
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(place)
    except OSError as error:
        taken.close()
        what = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another {what}"
        ) from None
    taken.setblocking(False)
    return taken


def listen(host: str, port: int, backlog: int = BACKLOG) -> socket.socket:
    """A non-blocking socket that listens. ConfigError if the address cannot be bound."""
    listener = reserve(host, port)
    try:
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --port") from None
    return listener
