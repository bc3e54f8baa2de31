"""Config: everything that a user may set about an Endpoint, checked when it is made.

Here: the fields, their checks, reading them from a dict or the environment, and the measured defaults that
stand behind `None` (lanes, movers), each with its measurement. Not here: what the settings do, the sizes of
chunks (native/protocol/chunking.hpp).

Invariant: a Config that exists can be used as it is. Keys, which this version can't honour, are refused; of
limits that it doesn't keep yet (`WITHOUT_EFFECT`) an Endpoint warns, so that nobody runs with less
protection than he asked for and doesn't know it. A key is never shown, not even in an error.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from kvtransport.errors import ConfigError
from kvtransport.types import BACKENDS, PROTECTIONS, Protection

KIB = 1 << 10
MIB = 1 << 20

MAX_CHUNK_NBYTES = MIB
"""The wire's limit for the body of a chunk."""

ENV_PREFIX = "KVTRANSPORT_"
MEMORY_KINDS = ("host", "cuda")
LATER_BACKENDS = ("ucx", "cuda_ipc")
WITHOUT_EFFECT = ("max_handshakes_per_s", "max_handshakes_per_s_per_address", "handshake_burst_per_address")

_log = logging.getLogger("kvtransport.config")


def available_cpus() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def default_lanes(cpus: int) -> int:
    """Return how many data sockets a connection has, on a machine of `cpus` cores.

    Measured on 2 cores (loopback, 512 MiB in 64 KiB pieces): 1 lane 7.5 GB/s, 2 lanes 15.8, 4 lanes 15.2;
    the raw limit of 2 connections 14.4. More cores were not measured, so the formula doesn't go beyond what
    was.
    """
    return min(2, max(1, cpus))


def default_movers(cpus: int) -> int:
    """Return how many native threads move payload, on a machine of `cpus` cores.

    Measured on 2 cores: an epoll mover for each of 2 lanes 15.8 GB/s; a thread for each lane and direction
    16.5, with twice the threads; one thread for all lanes 7.2.
    """
    return default_lanes(cpus)


def _field(kind: str, default: object, low: float = 0, high: float = 0) -> Any:
    """Return a dataclass field that `_check` checks as `kind`; `low` and `high` bound a number."""
    shown = kind != "later"
    return field(default=default, repr=shown, metadata={"kind": kind, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of an Endpoint. None stands for the default that docs/reference/config.md gives.

    backends: names of the ways that may be used, the preferred first; None: all that this version has.
    protection: the least that this side accepts, "plain" | "digest" | "aead"; the stricter of the two
        sides' is used.
        None: plain on unix sockets, digest on TCP.
    require: {"host" | "cuda": names}: NoCommonPath instead of another way for that kind of memory.
    keys, key_file, authorize: not in this version; a Config with one of them is refused.
    insecure: True: talk to peers of which nothing is proved. Loud, every time.
    lanes, movers: see `default_lanes`, `default_movers`. chunk_nbytes: None: by the transfer, see
        native/protocol/chunking.hpp. The smaller of the two sides' lanes and chunks is used.
    cpus: the cores that native threads may run on; None: all of the process's.
    socket_buffer_nbytes: of each data socket; None: what suits loopback, else as the system sizes them.
    failover, reconnect: without effect until an Endpoint can do them.
    dead_after_s: a peer that is silent for so long is lost (it is pinged all the time).
    handshake_timeout_s: for a stranger, from accept to the end of the handshake. `connect` has its own
        timeout.

    The limits bound what others can make us keep. Before a handshake is over: `max_pending_handshakes`, in
    all and `_per_address`; `max_handshakes_per_s`, in all and `_per_address` (with a
    `handshake_burst_per_address`). Per peer: `max_unmatched` offers or wants that have no partner yet,
    `max_regions` announced, `max_control_queue_nbytes` and `max_message_queue_nbytes` waiting,
    `max_transfer_pieces` in one transfer. Per endpoint: `max_connections`, `max_protocol_nbytes`. What
    exceeds them here waits, or raises ResourceLimit where waiting can't help; a peer's excess is
    ResourceLimit for that peer; but what peers that are gone have left of messages is dropped beyond
    `max_protocol_nbytes`, with a warning. The rates and the burst are without effect in this version: who
    sets them is warned by Endpoint.

    ConfigError names the field that can't be used, and says what to do.
    """

    backends: tuple[str, ...] | None = _field("backends", None)
    protection: Protection | None = _field("protection", None)  # noqa: RUF009
    require: Mapping[str, tuple[str, ...]] | None = _field("require", None)
    keys: Mapping[str, bytes] | None = _field("later", None)
    key_file: str | None = _field("later", None)
    authorize: Mapping[str, tuple[str, ...]] | None = _field("later", None)
    insecure: bool = _field("bool", False)
    lanes: int | None = _field("int", None, 1, 32)
    chunk_nbytes: int | None = _field("int", None, 64, MAX_CHUNK_NBYTES)
    movers: int | None = _field("int", None, 1, 64)
    cpus: tuple[int, ...] | None = _field("cpus", None)
    socket_buffer_nbytes: int | None = _field("int", None, 16 * KIB, 1024 * MIB)
    failover: bool = _field("bool", True)
    reconnect: bool = _field("bool", True)
    dead_after_s: float = _field("float", 2.0, 0.5, 3600)
    handshake_timeout_s: float = _field("float", 3.0, 0.05, 60)
    max_pending_handshakes: int = _field("int", 64, 1, 4096)
    max_pending_handshakes_per_address: int = _field("int", 8, 1, 4096)
    max_handshakes_per_s: int = _field("int", 100, 1, 1_000_000)
    max_handshakes_per_s_per_address: int = _field("int", 20, 1, 1_000_000)
    handshake_burst_per_address: int = _field("int", 32, 1, 1_000_000)
    max_connections: int = _field("int", 1024, 1, 65_536)
    max_unmatched: int = _field("int", 1024, 1, 1_048_576)
    max_regions: int = _field("int", 1024, 1, 65_536)
    max_transfer_pieces: int = _field("int", 16 * MIB, 1, 1 << 31)
    max_control_queue_nbytes: int = _field("int", MIB, 64 * KIB, 1024 * MIB)
    max_message_queue_nbytes: int = _field("int", 64 * MIB, MIB, 1 << 40)
    max_protocol_nbytes: int = _field("int", 256 * MIB, MIB, 1 << 40)

    def __post_init__(self) -> None:
        """Check every field and make its value immutable."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                object.__setattr__(self, f.name, _check(f.name, f.metadata, value))
            elif f.default is not None:
                raise ConfigError(
                    f"{f.name}: None is not a setting; leave it out for the default, {f.default}"
                )

    def __hash__(self) -> int:
        """By value, like ==; the mapping `require`, which has no hash, by its items."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["require"] = None if self.require is None else frozenset(self.require.items())
        return hash(tuple(values.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle what was given: the copy checks it anew, where it is."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["require"] = None if self.require is None else dict(self.require)
        return type(self).from_dict, ({name: value for name, value in values.items() if value is not None},)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Make a Config of {field: value}, as JSON or TOML give it. An unknown field is a ConfigError."""
        names = [f.name for f in fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(f"{name!r}: unknown setting{_near(str(name), names)}")
        return cls(**values)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Make a Config of the environment: KVTRANSPORT_LANES=4, KVTRANSPORT_BACKENDS=tcp and so on.

        Lists are separated by commas; `require` is written `host=inproc,tcp;cuda=tcp`; yes and no are 1 and
        0, true and false. A variable that begins with KVTRANSPORT_ and is no field, or is empty, is a
        ConfigError.
        """
        known = {ENV_PREFIX + f.name.upper(): f for f in fields(cls)}
        values: dict[str, Any] = {}
        for variable, text in (os.environ if environ is None else environ).items():
            if not variable.startswith(ENV_PREFIX):
                continue
            if variable not in known:
                raise ConfigError(f"{variable}: unknown setting{_near(variable, known)}")
            if not text.strip():
                raise ConfigError(f"{variable}: is empty; unset it for the default")
            f = known[variable]
            values[f.name] = _parse(variable, f.metadata["kind"], text.strip())
        return cls(**values)


def warn_of_unkept(config: Config) -> None:
    """Log the limits that were set and have no effect, in one line."""
    defaults = {f.name: f.default for f in fields(Config)}
    named = [name for name in WITHOUT_EFFECT if getattr(config, name) != defaults[name]]
    if named:
        _log.warning("%s: without effect in this version; new connections aren't limited", ", ".join(named))


def _near(name: str, known: Collection[str]) -> str:
    """Return a hint at the known name that is most like `name`."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; the settings are {', '.join(known)}"


def _check(name: str, metadata: Mapping[str, Any], value: Any) -> Any:
    """Return the field's value as it is kept; ConfigError where it can't be used."""
    kind = metadata["kind"]
    if kind == "later":
        raise ConfigError(f"{name}: needs authentication by keys, which is not in this version; leave it out")
    if kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: {value!r} is neither True nor False")
        return value
    if kind in ("int", "float"):
        return _check_number(name, kind, metadata["low"], metadata["high"], value)
    if kind == "protection":
        return _check_protection(value)
    if kind == "backends":
        return _check_backends(name, value)
    if kind == "require":
        return _check_require(value)
    return _check_cpus(value)


def _check_number(name: str, kind: str, low: float, high: float, value: Any) -> int | float:
    allowed = (int,) if kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise ConfigError(f"{name}: {value!r} is not {'an integer' if kind == 'int' else 'a number'}")
    if not low <= value <= high:
        raise ConfigError(f"{name}: {value} is out of range; choose from {low} to {high}")
    return value if kind == "int" else float(value)


def _check_protection(value: Any) -> str:
    if value not in PROTECTIONS:
        raise ConfigError(f"protection: {value!r} is unknown; choose one of {', '.join(PROTECTIONS)}")
    if value == "aead":
        raise ConfigError(
            'protection: "aead" needs keys, which are not in this version; choose plain or digest'
        )
    return str(value)


def _check_backends(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Collection) or not value:
        raise ConfigError(f"{name}: {value!r} is not a list of names; choose of {', '.join(BACKENDS)}")
    for backend in value:
        if backend in LATER_BACKENDS:
            raise ConfigError(f"{name}: {backend!r} is not in this version; choose of {', '.join(BACKENDS)}")
        if backend not in BACKENDS:
            raise ConfigError(f"{name}: {backend!r} is unknown{_near(str(backend), BACKENDS)}")
    if len(set(value)) < len(value):
        raise ConfigError(f"{name}: {value!r} names one twice; remove it")
    return tuple(value)


def _check_require(value: Any) -> Mapping[str, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        raise ConfigError(f'require: {value!r} is not a mapping; write it like {{"host": ("tcp",)}}')
    for kind in value:
        if kind not in MEMORY_KINDS:
            raise ConfigError(f"require: {kind!r} is no kind of memory; choose of {', '.join(MEMORY_KINDS)}")
    return MappingProxyType(
        {kind: _check_backends(f"require[{kind!r}]", names) for kind, names in value.items()}
    )


def _check_cpus(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Collection) or not value:
        raise ConfigError(f"cpus: {value!r} is not a list of core numbers")
    allowed = os.sched_getaffinity(0)
    for cpu in value:
        if isinstance(cpu, bool) or not isinstance(cpu, int) or cpu not in allowed:
            raise ConfigError(
                f"cpus: {cpu!r} is not a core that this process may run on; choose of {sorted(allowed)}"
            )
    return tuple(value)


def _parse(variable: str, kind: str, text: str) -> Any:
    """Return the value that `text` writes; ConfigError where it can't be read."""
    if kind == "later":
        return text
    if kind == "bool":
        try:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
                text.lower()
            ]
        except KeyError:
            raise ConfigError(f"{variable}: {text!r} is neither 1 nor 0") from None
    if kind == "require":
        pairs = [part.partition("=") for part in text.split(";")]
        return {kind.strip(): _split(names) for kind, _, names in pairs}
    if kind == "backends":
        return _split(text)
    if kind == "protection":
        return text
    number = float if kind == "float" else int
    try:
        return [int(part) for part in _split(text)] if kind == "cpus" else number(text)
    except ValueError:
        raise ConfigError(f"{variable}: {text!r} can't be read as a number") from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
