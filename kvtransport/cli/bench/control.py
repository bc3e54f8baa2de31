"""What the two processes of the bench tell each other: JSON, by `send_message` and `recv_messages`.

Here: the messages and their strict parser, and asking. Not here: what is done about them (`serving`, `running`).

Invariant: what can't be parsed, or has a field too many, is refused; nothing is allocated for a number unchecked.
"""

from __future__ import annotations

import time
from typing import Annotated, Final

import msgspec

from kvtransport.connection import Connection
from kvtransport.endpoint import Endpoint
from kvtransport.errors import PeerLost, WaitTimeout

PROTOCOL: Final = 1
"""Of these messages: both sides must have the same."""
LIMIT_S: Final = 120.0
"""For one round, and for filling the source's memory."""

_Name = Annotated[str, msgspec.Meta(max_length=16)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_Time = Annotated[float, msgspec.Meta(ge=0)]


class Open(msgspec.Struct, tag="open", forbid_unknown_fields=True):
    """The runner begins: make memory for a case, fill it."""

    protocol: int
    case: _Name
    verb: _Name
    scale: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 1


class Round(msgspec.Struct, tag="round", forbid_unknown_fields=True):
    """The runner is ready for the round of this seed."""

    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Close(msgspec.Struct, tag="close", forbid_unknown_fields=True):
    """The runner has what it wanted."""


class Opened(msgspec.Struct, tag="opened", forbid_unknown_fields=True):
    """The source's memory is ready."""

    version: _Name


class Moved(msgspec.Struct, tag="moved", forbid_unknown_fields=True):
    """The round is over: what it took, as seen by the source. seconds: of each transfer, from post to result."""

    seconds: Annotated[list[_Time], msgspec.Meta(max_length=1 << 16)]
    cpu_s: _Time


class Refused(msgspec.Struct, tag="refused", forbid_unknown_fields=True):
    """The server won't, or couldn't."""

    reason: _Text


Request = Open | Round | Close
Reply = Opened | Moved | Refused

_requests: Final = msgspec.json.Decoder(Request)
_replies: Final = msgspec.json.Decoder(Reply)


class BenchError(Exception):
    """The bench can't go on; the message is for its user."""


def request_of(data: bytes) -> Request:
    """Parse what a runner has sent. BenchError: it is none."""
    try:
        request: Request = _requests.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BenchError(f"not a request of the bench: {e}") from None
    return request


def encode(message: Request | Reply) -> bytes:
    """Return a message's bytes."""
    return msgspec.json.encode(message)


class Asking:
    """The runner's side: one request, one reply."""

    def __init__(self, endpoint: Endpoint, connection: Connection) -> None:
        """Of the connection to the server, the endpoint's only one."""
        self._endpoint = endpoint
        self._connection = connection

    def ask(self, request: Request) -> Opened | Moved:
        """Return the reply. BenchError: refused. WaitTimeout, PeerLost."""
        self._connection.send_message(encode(request))
        deadline = time.monotonic() + LIMIT_S
        while (left := deadline - time.monotonic()) > 0:
            for _, data in self._endpoint.recv_messages(min(left, 0.5)):
                reply = _reply_of(data)
                if isinstance(reply, Refused):
                    raise BenchError(f"the server refused: {reply.reason}")
                return reply
            if self._connection.state == "lost":
                raise PeerLost("the server has gone", cause="closed")
        raise WaitTimeout(f"the server had no answer within {LIMIT_S:g} s")


def _reply_of(data: bytes) -> Reply:
    try:
        reply: Reply = _replies.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BenchError(f"the server's answer is not one of `kvtransport bench serve`: {e}") from None
    return reply
