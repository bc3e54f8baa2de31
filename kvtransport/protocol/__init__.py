"""The session before its first frame: pure state machines. Bytes or events in, bytes or events out.

Here: the bytes of a handshake, the machine that runs one, the suites that authenticate it. Not here: sockets,
clocks, threads (`kvtransport.acceptor`), and frames (native).
"""
