"""Proxy: stands between two ends of a TCP link, and does to their bytes what a fault says.

Here: accepting, relaying, faults at exact bytes. Not here: who the ends are (`peers`).

Invariant: a byte that no fault touches arrives unchanged and in order; every socket and thread is gone after `close`.
"""

import contextlib
import itertools
import select
import socket
import struct
import threading
from dataclasses import dataclass, field

LIMIT_S = 30
PREAMBLE_NBYTES, KIND_AT = 32, 12
KINDS = {1: "control", 2: "lane"}
PREFIX_NBYTES = {("lane", "up"): 96, ("lane", "down"): 16, ("control", "up"): 0, ("control", "down"): 0}
"""Bytes of a link before its frames, in the dialler's direction ("up") and back. A control link's count all."""


@dataclass
class Fault:
    """At byte `at` of what a link carries in one direction: "flip" it, "hold" it and what follows, "fin" or "rst".

    at: counted from a lane's first frame; None: the next byte, whichever it is, once `armed` is set.
    reached: the fault has happened. go: lets what is held go on.
    """

    kind: str
    way: str
    at: int | None
    action: str
    armed: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def place(self, kind: str, way: str, offset: int, size: int) -> int | None:
        """Say where in the next `size` bytes, the first of which is byte `offset`, it strikes."""
        if self.reached.is_set() or (kind, way) != (self.kind, self.way):
            return None
        if self.at is None:
            return 0 if self.armed.is_set() else None
        return self.at - offset if offset <= self.at < offset + size else None


class Proxy:
    """Listens at `address`, and dials `target` for everyone who comes. A context manager."""

    def __init__(self, target: str, faults: tuple[Fault, ...] = ()) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._faults = (host, int(port)), faults
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._run(self._accept)

    def cut(self, how: str = "rst") -> None:
        """End all links that there are."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            end(sock, how)

    def close(self) -> None:
        """End the links and the threads."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for fault in self._faults:
            fault.go.set()
        self.cut("fin")
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        self.cut("fin")

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _next(self) -> tuple[str, int]:
        return self._target

    def _run(self, what, *arguments) -> None:
        thread = threading.Thread(target=what, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                dialled, _ = self._server.accept()
                accepted = socket.create_connection(self._next())
            except OSError:
                return
            for sock in (dialled, accepted):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += [dialled, accepted]
            self._run(self._link, dialled, accepted)

    def _link(self, dialled: socket.socket, accepted: socket.socket) -> None:
        try:
            preamble = dialled.recv(PREAMBLE_NBYTES, socket.MSG_WAITALL)
            accepted.sendall(preamble)
        except OSError:
            return
        kind = KINDS.get(preamble[KIND_AT] if len(preamble) > KIND_AT else 0, "control")
        up = PREAMBLE_NBYTES - PREFIX_NBYTES[kind, "up"]
        self._run(self._relay, dialled, accepted, kind, "up", up)
        self._run(self._relay, accepted, dialled, kind, "down", -PREFIX_NBYTES[kind, "down"])

    def _relay(self, source, sink, kind: str, way: str, offset: int) -> None:
        """Carry bytes until an end closes; then close the other one the same way."""
        how = "fin"
        try:
            while data := received(source):
                if not self._pass(bytearray(data), source, sink, kind, way, offset):
                    return
                offset += len(data)
        except ConnectionError:
            how = "rst"
        except OSError:
            return
        end(sink, how)

    def _pass(self, data: bytearray, source, sink, kind: str, way: str, offset: int) -> bool:
        """Send `data` on, with what the faults do to it; False: the link has been cut."""
        sent = 0
        for fault in self._faults:
            place = fault.place(kind, way, offset, len(data))
            if place is None:
                continue
            if fault.action == "flip":
                data[place] ^= 0x10
                fault.reached.set()
                continue
            sink.sendall(data[sent:place])
            sent = place
            fault.reached.set()
            if fault.action != "hold":
                end(sink, fault.action)
                end(source, fault.action)
                return False
            fault.go.wait(LIMIT_S)
        sink.sendall(data[sent:])
        return True


class Balancer(Proxy):
    """One address for several targets, who get what comes in turn."""

    def __init__(self, *targets: str) -> None:
        self._turns = itertools.cycle(
            (host, int(port)) for host, _, port in (t.rpartition(":") for t in targets)
        )
        super().__init__(targets[0])

    def _next(self) -> tuple[str, int]:
        return next(self._turns)


def received(sock: socket.socket) -> bytes:
    """Return what has come; nothing at the end.

    A call that waited for it would keep the socket from being closed, and its RST from being sent; epoll doesn't,
    but isn't told of the closing.
    """
    with select.epoll() as waiting:
        if (fd := sock.fileno()) >= 0:
            waiting.register(fd, select.EPOLLIN)
        while not waiting.poll(0.05):
            if sock.fileno() < 0:
                raise OSError("closed by us")
    return sock.recv(65536, socket.MSG_DONTWAIT)


def end(sock: socket.socket, how: str) -> None:
    """Close a connection whose socket other threads may be using: by FIN, or by RST."""
    with contextlib.suppress(OSError):
        if how == "rst":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        else:
            sock.shutdown(socket.SHUT_RDWR)
