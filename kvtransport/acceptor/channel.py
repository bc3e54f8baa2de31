"""A handshake over a non-blocking socket.

Here: bytes between a socket and a handshake machine, read in the sizes that the machine wants. Not here:
waiting, deadlines, what the events mean.

Invariant: not a byte beyond the handshake is read. An error closes nothing by itself; `close` says what is
left to say first, without waiting for it.
"""

from __future__ import annotations

import contextlib
import select
import selectors
import socket

from kvtransport.errors import KVTransportError
from kvtransport.protocol.handshake import Event, Handshake


class Channel:
    """One socket and its machine."""

    def __init__(self, sock: socket.socket, machine: Handshake) -> None:
        self.sock = sock
        self.machine = machine
        self._unsent = bytearray()

    def interest(self) -> int:
        """Return what to wait for: selectors.EVENT_READ, and EVENT_WRITE while bytes are unsent."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)

    def settled(self) -> bool:
        """Say whether all that the machine has said is on its way."""
        return not self._unsent

    def flush(self) -> None:
        """Send what can be sent. Raises ClosedByPeer."""
        self._unsent += self.machine.outgoing()
        try:
            while self._unsent:
                sent = self.sock.send(self._unsent, socket.MSG_NOSIGNAL)
                del self._unsent[:sent]
        except BlockingIOError:
            return
        except OSError as e:
            raise ClosedByPeer(e.strerror or str(e)) from None

    def read(self) -> list[Event]:
        """Read the next message, as far as it is there. Raises ClosedByPeer, and what the machine raises."""
        while wanted := self.machine.wants():
            try:
                data = self.sock.recv(wanted)
            except BlockingIOError:
                break
            except OSError as e:
                raise ClosedByPeer(e.strerror or str(e)) from None
            if not data:
                self._closed()
            events = self.machine.receive(data)
            if events:
                return events
        return []

    def close(self) -> None:
        """Close the socket, after a last try to send what the machine has said (a REJECT)."""
        with contextlib.suppress(ClosedByPeer):
            self.flush()
        self.sock.close()

    def _closed(self) -> None:
        try:
            self.machine.close()
        except KVTransportError as e:
            raise ClosedByPeer(str(e)) from None


def has_hung_up(sock: socket.socket) -> bool:
    """Say whether the other end has closed, though bytes of it may be unread."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


class ClosedByPeer(Exception):
    """The peer closed or reset the connection, or the network did: another try may do better."""
