"""Another user of this machine, played by a child process: only root can have one."""

import contextlib
import os
import socket

import pytest

NOBODY = 65534


def as_nobody(task):
    """Run `task` in a child of another uid; return the child's pid, whose status is 0 if it raised nothing."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to act as another user")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            task()
            status = 0
        finally:
            os._exit(status)
    return pid


@contextlib.contextmanager
def squatter(host, serve=lambda sock: None):
    """The other user listens at a port of `host`, and does `serve` to who comes; it ends with the block.

    Yields the port, and a call that waits until it has accepted.
    """
    told, tells = os.pipe()
    ended, ends = os.pipe()

    def squat():
        os.close(ends)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as server:
            server.settimeout(10)
            os.write(tells, str(server.getsockname()[1]).encode())
            with server.accept()[0] as sock:
                os.write(tells, b"!")
                serve(sock)
                os.read(ended, 1)

    child = as_nobody(squat)
    os.close(tells)
    os.close(ended)
    try:
        yield int(os.read(told, 10)), lambda: os.read(told, 1) == b"!"
    finally:
        os.close(ends)
        status = os.waitpid(child, 0)[1]
        os.close(told)
    assert status == 0
