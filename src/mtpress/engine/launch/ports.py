"""Ports of this machine: a free one, and who listens on a taken one.

In: a host and a port. Out: a port, or an InputError that names its owner. Leaves out: serving (server.py).
"""

import contextlib
import errno
import os
import socket
import time

import psutil

from mtpress.errors import InputError

POLL_SECONDS = 0.05


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        try:
            server.bind((host, 0))
        except OSError as error:
            raise InputError(f"--host {host}: cannot be listened on ({error.strerror or error}); 127.0.0.1 can") from None
        return int(server.getsockname()[1])


def refuse_taken(host: str, port: int) -> None:
    """InputError where nothing new can listen there, naming who does."""
    problem = _bind_error(host, port)
    if problem == errno.EADDRINUSE:
        owner = owner_of(port)
        raise InputError(f"port {port} is taken{f' by {owner}' if owner else ''}; choose another --port, or end what uses it")
    if problem:
        raise InputError(f"{host}:{port} cannot be listened on ({os.strerror(problem)}); choose another --host or --port")


def wait_until_free(host: str, port: int, seconds: float) -> bool:
    """Whether something new can listen there within so many seconds: the kernel may take a moment to let go of a port."""
    deadline = time.monotonic() + seconds
    while (taken := _bind_error(host, port) == errno.EADDRINUSE) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return not taken


def _bind_error(host: str, port: int) -> int:
    """errno of listening there; 0 where it works."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    except OSError as error:
        return error.errno or errno.EADDRNOTAVAIL
    return 0


def owner_of(port: int) -> str | None:
    """Who listens on a port, where the system tells."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return None
