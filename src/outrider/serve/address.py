"""Where a server listens, and whether others may reach it."""

from __future__ import annotations

import errno
import ipaddress
import os
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


def reserve(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet: who connects is refused. ConfigError if it cannot be had."""
    name = host.strip("[]")
    try:
        family, *_, place = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"there is no address {host!r} ({error.strerror or error}): choose another --host") from None
    # named, since asyncio sends small pieces at once only on sockets that say they are TCP's
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
    """A socket that listens and does not block. ConfigError if the address cannot be had."""
    listener = reserve(host, port)
    try:
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --port") from None
    return listener
