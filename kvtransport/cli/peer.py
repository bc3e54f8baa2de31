"""Which ways lead to a peer: each backend of Config.backends is tried by itself.

Here: the tries, and what to do where one fails. Not here: the choice that an Endpoint makes (`acceptor.places`).

Invariant: each try has an Endpoint of its own, that allows one backend (and what that can't do without) and is
closed afterwards.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any, Final

from kvtransport import errors
from kvtransport.config import Config
from kvtransport.connection import Connection
from kvtransport.endpoint import Endpoint
from kvtransport.types import BACKENDS

MESSAGE: Final = b"kvtransport doctor"
MESSAGES: Final = 3
CONNECT_S: Final = 3.0

_BESIDE: Final = {"shm": "tcp"}
"""Ways of sessions that another backend makes, and which one."""

_OTHER_PROCESS: Final = "joins endpoints of one process, and this is another one"

_REMEDIES: Final[dict[type[Exception], str]] = {
    errors.ConnectTimeout: "see that an endpoint listens there (its listen() returns the address) and that no "
    "firewall drops it",
    errors.InsecureConfigError: "use loopback or unix:/path on one host; --insecure where all who can reach the "
    "address may take part, and insecure=True at the peer",
    errors.AuthenticationError: "run both ends as one user, and see that it is your peer that listens there",
    errors.VersionMismatch: "install the same version of kvtransport at both ends",
    errors.RemoteProtocolError: "something else than kvtransport listens there: correct the address",
    errors.NoCommonPath: "give both ends a Config whose backends and require allow a way in common",
    errors.PeerLost: "ask the peer for its new descriptor, if it has restarted; else see its log",
    errors.WaitTimeout: "it is connected and confirms no message: see whether the peer's process hangs",
    OSError: "correct the address: no such name or path here",
    ValueError: "correct the address",
}


@dataclass(frozen=True)
class Way:
    """One backend, tried by itself. explain: of its Connection. round_trip_us: of a message; None: not sent."""

    reached: bool
    reason: str = ""
    remedy: str = ""
    explain: str = ""
    round_trip_us: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return dataclasses.asdict(self)


def try_ways(
    address: str, *, insecure: bool = False, sends: bool = True, timeout: float = CONNECT_S
) -> dict[str, Way]:
    """Return {backend: Way} to the endpoint that listens at `address`, for every backend of this version.

    Shared memory is a way of sessions by sockets: it is reached where such a session has it.

    sends: send the peer's `recv_messages` three short messages, to measure the round trip.
    timeout: of each connect, in seconds.
    """
    ways: dict[str, Way] = {}
    for name in sorted(BACKENDS, key=_BESIDE.__contains__):
        stream = ways.get(_BESIDE.get(name, ""))
        if stream is not None and not stream.reached:
            ways[name] = stream
        else:
            ways[name] = _try(name, address, insecure, sends, timeout)
    return {name: ways[name] for name in BACKENDS}


def _try(name: str, address: str, insecure: bool, sends: bool, timeout: float) -> Way:
    if name == "inproc":
        return Way(False, _OTHER_PROCESS)
    allowed = (name, _BESIDE[name]) if name in _BESIDE else (name,)
    try:
        with Endpoint(Config(backends=allowed, insecure=insecure)) as endpoint:
            connection = endpoint.connect(address, timeout)
            if connection.backend != name:
                return Way(False, *_refusal(name, endpoint.paths(connection)))
            trip = _round_trip_us(connection, timeout) if sends else None
            return Way(True, explain=connection.explain(), round_trip_us=trip)
    except (errors.KVTransportError, errors.WaitTimeout, OSError, ValueError) as e:
        return Way(False, f"{type(e).__name__}: {e}", _remedy(e))


def _refusal(name: str, paths: list[str]) -> tuple[str, str]:
    """Return why a connection doesn't go by a backend that it might have gone by, and the remedy."""
    head = f"{name}: refused: "
    reason, _, remedy = (
        next(line for line in paths if line.startswith(head)).removeprefix(head).partition("; ")
    )
    return reason, remedy


def _round_trip_us(connection: Connection, timeout: float) -> float:
    """Return the median time until the peer's endpoint has confirmed a message, in microseconds."""
    times = []
    for _ in range(MESSAGES):
        began = time.perf_counter()
        connection.send_message(MESSAGE).result(timeout)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def _remedy(error: Exception) -> str:
    return next((remedy for kind, remedy in _REMEDIES.items() if isinstance(error, kind)), "")


def lines(address: str, ways: dict[str, Way]) -> list[str]:
    """Return the text form."""
    told = [f"ways to {address}"]
    for name, way in ways.items():
        if not way.reached:
            told.append(f"  {name:<9} not reached: {way.reason}")
            told += [" " * 14 + f"-> {way.remedy}"] if way.remedy else []
            continue
        trip = "" if way.round_trip_us is None else f", round trip of a message {way.round_trip_us:.0f} us"
        told.append(f"  {name:<9} reached{trip}")
        told += [" " * 12 + line for line in way.explain.splitlines()]
    return told
