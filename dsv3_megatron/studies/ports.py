"""A place for the ranks of a job on this machine to meet."""

import socket


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now; another process may take it before it is used."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
