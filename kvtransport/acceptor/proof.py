"""Asking who holds the other end of a socket that we have dialled, until it is accepted.

Here: how often, and how soon again. Not here: how it is found out (`backends`), what an answer leads to (`attempt`,
`lanes`).

Invariant: not a byte is sent, and the thread is held for less than a millisecond.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final

from kvtransport.backends.base import LinkProof, Policy, StreamBackend

NAPS: Final = 4
NAP_S: Final = 0.00005
"""The other end is mostly accepted within 100 us; a timer has the selector's grain, 1 ms."""
AGAIN_FIRST_S: Final = 0.001
AGAIN_LAST_S: Final = 0.05
"""How long to wait before the next call, twice as long each time."""


def ask(
    backend: StreamBackend, sock: socket.socket, policy: Policy, demand_open: Callable[[socket.socket], None]
) -> LinkProof | None:
    """Return the proof; None: not accepted yet, ask again later. Raises what `prove` and `demand_open` raise."""
    for _ in range(NAPS):
        proof = backend.prove(sock, policy)
        if proof is not None:
            return proof
        demand_open(sock)
        time.sleep(NAP_S)
    return None
