"""Ports to listen on: whether one is free (asked before a cluster starts), and which one is. Light."""

from __future__ import annotations

import contextlib
import errno
import random
import socket

from molmo_core.config import ConfigError


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when a server cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise ConfigError(f"serve: {host}:{port} {reason}; choose another, e.g. port={port + 1}") from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on at the moment, below those that systems hand out: nobody is given it before it is used."""
    for port in random.Random().sample(range(20_000, 32_000), 100):
        with contextlib.suppress(ConfigError):
            check_port(host, port)
            return port
    raise ConfigError(f"serve: no free port was found on {host}")
