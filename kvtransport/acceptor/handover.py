"""From a handshake to the engine: a control connection changes hands.

Here: what agreed terms are to the engine. Not here: agreeing on them (`protocol`), what becomes of the session
(`acceptor`). The engine is given: nothing in this package imports the extension.

Invariant: a control socket that was given to `open_session` belongs to the engine, whatever the call's
outcome.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from kvtransport.config import Config
from kvtransport.protocol import messages
from kvtransport.protocol.agreement import Terms

if TYPE_CHECKING:
    from kvtransport import _native


def open_session(
    engine: _native.Engine,
    sock: socket.socket,
    terms: Terms,
    config: Config,
    *,
    backend: str,
    peer_pid: int,
    shared_memory: bool,
) -> _native.Session:
    """Hand a control connection over to the engine, on the agreed terms."""
    limits = terms.peer.holds_peer_to()
    return engine.open_session(
        sock.detach(),
        session_id=terms.session_id,
        protection=terms.protection,
        lanes=terms.lanes,
        # 0: the native formula, by the size of each transfer. Else what one of the sides has set.
        chunk_nbytes=terms.chunk_nbytes if terms.chunk_nbytes < messages.CHUNK_MAX_NBYTES else 0,
        peer_pid=peer_pid,
        backend=backend,
        peer_max_unmatched=limits.max_unmatched,
        peer_max_regions=limits.max_regions,
        peer_max_message_queue_nbytes=limits.max_message_queue_nbytes,
        socket_buffer_nbytes=config.socket_buffer_nbytes or 0,
        peer_incarnation=terms.peer.incarnation,
        capabilities=terms.capabilities,
        shared_memory=shared_memory,
    )
