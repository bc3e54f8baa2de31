"""Ways to move bytes between two places: one file each, and `base`, the seam.

Here: what a backend's Python side is for: addresses, reaching a peer, proving who it is. Not here: bytes
(native), KV layouts, the messages of a handshake (`kvtransport.protocol`). Backends don't know each other.
"""
