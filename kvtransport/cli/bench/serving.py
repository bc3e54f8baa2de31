"""`kvtransport bench serve`: the source. It makes memory for the case that a runner names, and sends from it.

Here: one run at a time, the limit on memory, and when it ends. Not here: what a round does (`verbs`), the
runner's side (`running`).

Invariant: no more memory than the limit is held, and none of a run that has ended; whoever comes while another
one's run goes on is refused by name.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Final

from kvtransport import __version__
from kvtransport.cli.bench import control
from kvtransport.cli.bench.arena import Arena
from kvtransport.cli.bench.cases import case_of
from kvtransport.cli.bench.control import BenchError, Close, Moved, Open, Opened, Refused, Reply, Round
from kvtransport.cli.bench.verbs import VERBS, End, Verb
from kvtransport.connection import Connection
from kvtransport.endpoint import Endpoint
from kvtransport.errors import KVTransportError, WaitTimeout

_log = logging.getLogger("kvtransport.bench")

TICK_S: Final = 0.5
"""A runner that has gone without a word is noticed so much later, at most."""
SAY_S: Final = 5.0


class Server:
    """Answers runners until told otherwise."""

    def __init__(self, endpoint: Endpoint, memory_limit: int) -> None:
        """It listens already. memory_limit: bytes of the memory that runs may have."""
        self._endpoint = endpoint
        self._limit = memory_limit
        self._run: tuple[End, Verb] | None = None
        self._ended: bool | None = None

    def serve(self, once: bool) -> bool:
        """Serve for ever; once: until the first run is over, and return whether the runner said that it is."""
        while True:
            for connection, data in self._endpoint.recv_messages(TICK_S):
                self._answer(connection, data)
            if self._run is not None and self._run[0].connection.state == "lost":
                self._end(False)
            if once and self._ended is not None:
                return self._ended

    def _answer(self, connection: Connection, data: bytes) -> None:
        """Do what is asked, and reply; a runner that has gone meanwhile is found out by `serve`."""
        try:
            request = control.request_of(data)
            if isinstance(request, Open):
                self._open(connection, request)
                self._reply(connection, Opened(__version__))
                return
            end, verb = self._of(connection)
            if isinstance(request, Round):
                self._reply(connection, verb.source(end, request.seed))
            elif isinstance(request, Close):
                self._reply(connection, Moved([], 0.0))
                self._end(True)
        except (BenchError, KVTransportError, WaitTimeout, MemoryError, ValueError) as e:
            _log.warning("%s: refused: %s", connection.peer, e)
            self._reply(connection, Refused(str(e)[:1024]))

    def _reply(self, connection: Connection, reply: Reply) -> None:
        with contextlib.suppress(KVTransportError, WaitTimeout):
            connection.send_message(control.encode(reply)).result(SAY_S)

    def _open(self, connection: Connection, request: Open) -> None:
        """Make the memory of a run. BenchError, ValueError: it won't."""
        if request.protocol != control.PROTOCOL:
            raise BenchError(
                f"the runner's messages have version {request.protocol}, ours {control.PROTOCOL}: "
                f"install the same version of kvtransport at both ends"
            )
        if request.verb not in VERBS:
            raise BenchError(f"verb {request.verb!r} is unknown; the verbs are {', '.join(VERBS)}")
        if self._run is not None and self._run[0].connection.state != "lost":
            raise BenchError("another run goes on here: try again when it is over")
        case = case_of(request.case, request.scale)
        if case.pool_nbytes > self._limit:
            raise BenchError(
                f"case {case.name} takes {case.pool_nbytes} bytes, and the limit is {self._limit}: "
                f"serve with a larger --memory-limit, or run with a larger --scale"
            )
        self._end(None)
        arena = Arena(self._endpoint, case)
        arena.fill()
        self._run = End(connection, case, arena, arena.register(self._endpoint)), VERBS[request.verb]

    def _of(self, connection: Connection) -> tuple[End, Verb]:
        if self._run is None or self._run[0].connection is not connection:
            raise BenchError("no run of yours was opened here")
        return self._run

    def _end(self, said: bool | None) -> None:
        """Let go of the run's memory. said: whether its end was told, for `serve`; None: it doesn't matter."""
        if self._run is not None:
            self._run[0].pool.close()
            self._run = None
        if said is not None:
            self._ended = said
