"""How an Endpoint gets its peers: one Python thread that runs handshakes and dials, and sleeps otherwise.

Here: `loop` (the thread), `inbound` (a stranger), `dialler` and `lanes` (reaching a peer), `channel` (a
handshake over a socket), `roster` (who is connected; of two sessions with one peer which stays),
`reachability` (where this process runs). Not here: accepting and everything after the handshake (native),
what users see (`kvtransport.endpoint`).
"""

from kvtransport.acceptor.acceptor import Acceptor

__all__ = ["Acceptor"]
