"""TCP and unix sockets: addresses, listening, dialling, and the proof that the other end is the same user.

Here: the forms "127.0.0.1:7000", "[::1]:7000", "name:7000", "unix:/path"; what is refused without a key.
Not here: accepting and the bytes (native), the handshake.

Invariant: without a key, and without `insecure=True`, no socket listens or dials beyond unix sockets and
loopback, and no byte goes to an end whose user the system hasn't told to be ours.

How the other end is found out. On a unix socket SO_PEERCRED names it. On loopback TCP the kernel is asked
for the socket of the other end of this very connection (our addresses, swapped) and its owner: by one
sock_diag request, which takes 13 us; /proc/net/tcp{,6}, which shows the same rows, takes 14 ms on a machine
of 24 GiB since the whole hash table is walked, and is the fallback where netlink isn't allowed. A socket
that has not been accepted yet has no inode, and on older kernels shows uid 0: it proves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import stat
import struct
from collections.abc import Sequence
from typing import Final, TypeAlias, cast

from kvtransport.backends.base import TRIAL_S, LinkProof, Policy, Target, Viability
from kvtransport.errors import AuthenticationError, InsecureConfigError
from kvtransport.types import Protection

_log = logging.getLogger("kvtransport.tcp")

BACKLOG: Final = 512
UNIX_PREFIX: Final = "unix:"
UNIX_PATH_MAX: Final = 107  # sun_path without its final zero

_REMEDY = "run both ends as one user, or give both a key, or set insecure=True if anyone there may connect"
_SYSTEM_REMEDIES: Final = {
    errno.ENETUNREACH: "bring loopback up in this net namespace (ip link set lo up)",
    errno.EMFILE: "raise the limit of descriptors (ulimit -n)",
    errno.EPERM: "a seccomp filter or security module forbids it: let the container's profile allow sockets",
}


class TcpBackend:
    """The stream backend for TCP and unix sockets. Has no state."""

    name = "tcp"

    def viability(self) -> Viability:
        """Connect to itself over loopback and over a unix socket, and have the system prove both ends."""
        import tempfile  # which `import kvtransport` alone needn't pay for

        loopback = self._trial("127.0.0.1:0")
        try:
            with tempfile.TemporaryDirectory(prefix="kvt-") as folder:
                unix = self._trial(f"{UNIX_PREFIX}{folder}/socket")
        except OSError as e:
            unix = Viability(False, f"not tried: no temporary folder: {e}", "set TMPDIR to a folder of yours")
        parts = (("loopback TCP", loopback), ("unix sockets", unix))
        return Viability(loopback.usable or unix.usable, loopback.reason, loopback.remedy, parts)

    def serves(self, where: str) -> bool:
        """Say whether it is unix:/path or ends in a port."""
        return where.startswith(UNIX_PREFIX) or where.rpartition(":")[2].isdecimal()

    def check(self, where: str) -> None:
        """Raise ValueError where it is malformed."""
        if where.startswith(UNIX_PREFIX):
            _unix_target(where.removeprefix(UNIX_PREFIX))
        else:
            split_host_port(where)

    def may_block(self, where: str) -> bool:
        """Say whether it has a name and no numeric address."""
        return not is_numeric(where)

    def resolve(self, where: str) -> Sequence[Target]:
        """Return the numeric addresses that `where` stands for; blocks while a name service is asked."""
        if where.startswith(UNIX_PREFIX):
            return [_unix_target(where.removeprefix(UNIX_PREFIX))]
        host, port = split_host_port(where)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICSERV)
        return list(dict.fromkeys(_inet_target(family, cast(_SockAddr, addr)) for family, *_, addr in found))

    def demand_allowed(self, target: Target, policy: Policy) -> None:
        """Refuse what is neither a unix socket nor loopback, unless there is a key or `insecure=True`."""
        if policy.keyed or (is_local(target) and not policy.insecure):
            return
        if not policy.insecure:
            raise InsecureConfigError(
                f"{target}: without a key only unix sockets and loopback are allowed, since nothing else "
                f"proves who the peer is; use 127.0.0.1, [::1] or unix:/path, or give both ends a key, or "
                f"set insecure=True if all who can reach this address may take part"
            )
        _log.warning("insecure=True: whoever can reach %s may connect; nothing proves the peer", target)

    def default_protection(self, target: Target) -> Protection:
        """Return plain on unix sockets, digest on TCP."""
        return "plain" if target.family == socket.AF_UNIX else "digest"

    def listen(self, where: str, policy: Policy) -> TcpListener:
        """Open a listening socket; of a name with several addresses the first that can be bound."""
        targets = self.resolve(where)
        for target in targets:
            self.demand_allowed(target, policy)
        for last, target in enumerate(targets, 1 - len(targets)):
            try:
                return _bind(target)
            except OSError:
                if last == 0:
                    raise
        raise OSError(errno.EADDRNOTAVAIL, f"{where}: no address")

    def dial(self, target: Target) -> socket.socket:
        """Begin to connect."""
        sock = socket.socket(target.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            set_options(sock)
            dont_pace(sock, target)
            code = sock.connect_ex(target.sockaddr)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
        except BaseException:
            sock.close()
            raise
        return sock

    def dialled(self, sock: socket.socket) -> None:
        """Raise what the connect ended with; a TCP socket that met itself was refused."""
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0 and sock.family != socket.AF_UNIX and sock.getsockname() == sock.getpeername():
            code = errno.ECONNREFUSED  # simultaneous open with our own ephemeral port: nobody listens there
        if code:
            raise OSError(code, os.strerror(code))

    def accepted(self, sock: socket.socket) -> str:
        """Set its options; return the address without the port."""
        set_options(sock)
        return "a unix socket" if sock.family == socket.AF_UNIX else str(endpoint_of(sock.getpeername())[0])

    def prove(self, sock: socket.socket, policy: Policy) -> LinkProof | None:
        """Ask the kernel who holds the other end."""
        if policy.keyed or policy.insecure:
            return _unproved(sock)
        if sock.family == socket.AF_UNIX:
            pid, uid, _ = peer_credentials(sock)
            _demand_same_user(uid, "the unix socket")
            return LinkProof(uid, pid or None, "same user, by SO_PEERCRED", by_file=True)
        try:
            theirs, ours = endpoint_of(sock.getpeername()), endpoint_of(sock.getsockname())
        except OSError as e:
            if e.errno == errno.ENOTCONN:
                return None
            raise
        if not (theirs[0].is_loopback and ours[0].is_loopback):
            raise AuthenticationError(f"the peer is not on loopback, and there is no key; {_REMEDY}")
        row = socket_row(theirs, ours)
        if row is None or row.state != TCP_ESTABLISHED or not row.inode:
            return None
        _demand_same_user(row.uid, "the other end of the loopback connection")
        return LinkProof(row.uid, None, "same user, by the kernel's socket table")

    def owner(self, target: Target) -> int | None:
        """Return the uid of the listening socket at a loopback address."""
        if target.family == socket.AF_UNIX or not is_local(target):
            return None
        place = endpoint_of(target.sockaddr)
        row = socket_row(place, (place[0], 0))
        return row.uid if row and row.state == TCP_LISTEN else None

    def _trial(self, where: str) -> Viability:
        """Connect to a listener of our own, and prove each end to the other."""
        policy = Policy()
        try:
            with (
                contextlib.closing(self.listen(where, policy)) as listener,
                self.dial(listener.target) as dialled,
                listener.taken(TRIAL_S) as taken,
            ):
                self.dialled(dialled)
                proofs = [self.prove(sock, policy) for sock in (dialled, taken)]
        except OSError as e:
            return Viability(False, e.strerror or str(e), _SYSTEM_REMEDIES.get(e.errno or 0, ""))
        except ValueError as e:
            return Viability(False, str(e), "set TMPDIR to a folder with a shorter name")
        except AuthenticationError as e:
            words, _, remedy = str(e).partition("; ")
            return Viability(False, f"nothing proves who the peer is: {words}", remedy)
        if None in proofs:
            words = "the kernel's socket table doesn't show the other end of a connection"
            return Viability(False, words, f"/proc/net/tcp and NETLINK_SOCK_DIAG; else {_REMEDY}")
        return Viability(True, proofs[0].how if proofs[0] else "")


class TcpListener:
    """A listening socket, and its name in the file system if it has one."""

    def __init__(self, sock: socket.socket, target: Target) -> None:
        self._sock = sock
        self._path = target.sockaddr if target.family == socket.AF_UNIX else None
        self._inode = _inode(self._path) if self._path else None
        self.target = target if self._path else _inet_target(target.family, sock.getsockname())

    @property
    def reachable_as(self) -> str:
        """The address, or this host's name and the port."""
        if self._path or not endpoint_of(self.target.sockaddr)[0].is_unspecified:
            return self.target.text
        return f"{socket.gethostname()}:{self.target.sockaddr[1]}"

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def taken(self, timeout: float) -> socket.socket:
        """Accept the next connection here, not by the engine. TimeoutError: none comes."""
        self._sock.settimeout(timeout)
        return self._sock.accept()[0]

    def close(self) -> None:
        """Close, and unlink the path if it is still this socket's."""
        self._sock.close()
        if self._path and self._inode == _inode(self._path):
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self._path = None

    def abandon(self) -> None:
        """Close in a forked child: the path is the parent's."""
        self._path = None
        self._sock.close()


# --- addresses ------------------------------------------------------------------------------------------

_SockAddr: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
_Place: TypeAlias = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]


def split_host_port(where: str) -> tuple[str, int]:
    """Split "host:port" or "[v6]:port". ValueError says what is wrong."""
    host, colon, port = where.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{where!r}: an IPv6 address is written in brackets, like [::1]:7000")
    whole = colon and host and host.isprintable() and port.isdecimal() and port.isascii()
    if not whole or int(port) > 0xFFFF:
        raise ValueError(
            f"{where!r}: an address is written 127.0.0.1:7000, [::1]:7000, name:7000 or unix:/path"
        )
    return host, int(port)


def is_numeric(where: str) -> bool:
    """Say whether resolving `where` asks no name service. ValueError for a form that is none."""
    if where.startswith(UNIX_PREFIX):
        return True
    host = split_host_port(where)[0].partition("%")[0]
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_local(target: Target) -> bool:
    """Say whether the system can tell who is at the other end: unix sockets and loopback."""
    return target.family == socket.AF_UNIX or endpoint_of(target.sockaddr)[0].is_loopback


def endpoint_of(sockaddr: _SockAddr) -> _Place:
    """Return the address and port of a sockaddr; an IPv4 address in IPv6 clothes as what it is."""
    address = ipaddress.ip_address(sockaddr[0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address, sockaddr[1]


def _unix_target(path: str) -> Target:
    if not path or "\0" in path or len(os.fsencode(path)) > UNIX_PATH_MAX:
        raise ValueError(f"unix:{path!r}: a path has 1 to {UNIX_PATH_MAX} bytes, none of them zero")
    return Target(socket.AF_UNIX, path, UNIX_PREFIX + path)


def _inet_target(family: int, sockaddr: _SockAddr) -> Target:
    if family == socket.AF_INET:
        return Target(socket.AF_INET, sockaddr, f"{sockaddr[0]}:{sockaddr[1]}")
    host = socket.getnameinfo(sockaddr, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]  # with its scope
    return Target(socket.AF_INET6, sockaddr, f"[{host}]:{sockaddr[1]}")


# --- sockets --------------------------------------------------------------------------------------------


def set_options(sock: socket.socket) -> None:
    """Set what every connection has: no delay of small frames."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def dont_pace(sock: socket.socket, target: Target) -> None:
    """Choose reno where the address is loopback, before the socket connects or listens: once BBR, the choice
    of some systems, has begun, the kernel goes on pacing whatever is chosen then (docs/adr/0006).
    """
    if target.family != socket.AF_UNIX and is_local(target):
        with contextlib.suppress(OSError):  # not in this kernel
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _bind(target: Target) -> TcpListener:
    sock = socket.socket(target.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if target.family == socket.AF_UNIX:
            os.fchmod(sock.fileno(), 0o600)  # before bind: Linux gives the path this mode, less the umask
            _bind_unix(sock, target.sockaddr)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if target.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            dont_pace(sock, target)  # what it accepts inherits it
            sock.bind(target.sockaddr)
        sock.listen(BACKLOG)
        return TcpListener(sock, target)
    except OSError as e:
        sock.close()
        raise OSError(e.errno, f"can't listen at {target}: {e.strerror or e}") from None


def _bind_unix(sock: socket.socket, path: str) -> None:
    """Bind; a socket of ours that nobody listens at any more (its process was killed) is removed first."""
    try:
        sock.bind(path)
    except OSError as e:
        if e.errno != errno.EADDRINUSE or not _is_stale(path):
            raise
        os.unlink(path)
        sock.bind(path)


def _is_stale(path: str) -> bool:
    try:
        info = os.lstat(path)
        if not stat.S_ISSOCK(info.st_mode) or info.st_uid != os.geteuid():
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            return probe.connect_ex(path) == errno.ECONNREFUSED
    except OSError:
        return False


def _inode(path: str) -> tuple[int, int] | None:
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


# --- who is at the other end ----------------------------------------------------------------------------

TCP_ESTABLISHED: Final = 1
TCP_LISTEN: Final = 10
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2
_NO_COOKIE: Final = 0xFFFF_FFFF
_NETLINK_HEADER = struct.Struct("=IHHII")
_DIAG_HEAD = struct.Struct("=BBBBI")  # inet_diag_req_v2: family, protocol, extensions, pad, states
_DIAG_ID = struct.Struct("!HH16s16s")  # inet_diag_sockid: ports, addresses
_DIAG_ID_TAIL = struct.Struct("=III")  # its interface and cookie
_DIAG_OWNER = struct.Struct("=II")  # of inet_diag_msg: uid, inode
_DIAG_OWNER_AT: Final = _NETLINK_HEADER.size + 4 + 48 + 12


class SocketRow:
    """What the kernel tells of one TCP socket."""

    __slots__ = ("inode", "state", "uid")

    def __init__(self, state: int, uid: int, inode: int) -> None:
        self.state = state
        self.uid = uid
        self.inode = inode


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of a unix socket's other end: who connected, or who called listen."""
    pid, uid, gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


def socket_row(local: _Place, remote: _Place) -> SocketRow | None:
    """Return this namespace's TCP socket with these addresses, else the one that listens at `local`."""
    try:
        return _row_by_diag(local, remote)
    except OSError:
        return _row_by_proc(local, remote)


def _row_by_diag(local: _Place, remote: _Place) -> SocketRow | None:
    """Ask by NETLINK_SOCK_DIAG (sock_diag(7)). OSError: it can't be asked, or doesn't know."""
    family = socket.AF_INET if local[0].version == 4 else socket.AF_INET6
    ports_and_addresses = _DIAG_ID.pack(local[1], remote[1], local[0].packed, remote[0].packed)
    request = (
        _DIAG_HEAD.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFF_FFFF)
        + ports_and_addresses
        + _DIAG_ID_TAIL.pack(0, _NO_COOKIE, _NO_COOKIE)
    )
    header = _NETLINK_HEADER.pack(
        _NETLINK_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0
    )
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK  # the kernel answers within send()
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as sock:
        sock.sendto(header + request, (0, 0))
        answer, sender = sock.recvfrom(4096)
    _, message_type, *_ = _NETLINK_HEADER.unpack_from(answer)
    if sender[0] != 0 or message_type != _SOCK_DIAG_BY_FAMILY:
        if message_type == _NLMSG_ERROR:
            raise OSError(-struct.unpack_from("=i", answer, _NETLINK_HEADER.size)[0], "sock_diag")
        raise OSError(errno.EPROTO, "sock_diag")
    uid, inode = _DIAG_OWNER.unpack_from(answer, _DIAG_OWNER_AT)
    return SocketRow(answer[_NETLINK_HEADER.size + 1], uid, inode)


def _row_by_proc(local: _Place, remote: _Place) -> SocketRow | None:
    """Look through /proc/net/tcp and tcp6, where an IPv4 socket may stand in either form."""
    wanted = {_proc_form(local, mapped) + " " + _proc_form(remote, mapped) for mapped in (False, True)}
    for name in ("tcp", "tcp6") if local[0].version == 4 else ("tcp6",):
        try:
            with open(f"/proc/thread-self/net/{name}", encoding="ascii") as table:
                rows = table.read().splitlines()
        except OSError:
            continue
        for row in rows[1:]:
            fields = row.split()
            if f"{fields[1]} {fields[2]}" in wanted:
                return SocketRow(int(fields[3], 16), int(fields[7]), int(fields[9]))
    return None


def _proc_form(place: _Place, mapped: bool) -> str:
    packed = place[0].packed
    if mapped and len(packed) == 4:
        packed = bytes(10) + b"\xff\xff" + packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{place[1]:04X}"


def _demand_same_user(uid: int, where: str) -> None:
    ours = os.geteuid()
    if uid != ours:
        raise AuthenticationError(f"{where} belongs to uid {uid}, and we are uid {ours}; {_REMEDY}")
    if _may_be_anyone(uid):
        raise AuthenticationError(
            f"{where} belongs to uid {uid}, which stands for every user that this user namespace doesn't know; "
            f"map your uid into the namespace, or set insecure=True if anyone there may connect"
        )


def _may_be_anyone(uid: int) -> bool:
    """Say whether `uid` is what a user namespace shows for all that it doesn't know (user_namespaces(7))."""
    try:
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as f:
            if uid != int(f.read()):
                return False
        with open("/proc/self/uid_map", encoding="ascii") as f:
            return f.read().split() != ["0", "0", "4294967295"]
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno in (errno.EMFILE, errno.ENFILE):
            raise  # want of descriptors says nothing of anybody: the try fails, and is made again
        return True


def _unproved(sock: socket.socket) -> LinkProof:
    """Return what is known of the other end where nothing depends on it."""
    if sock.family == socket.AF_UNIX:
        pid, uid, _ = peer_credentials(sock)
        return LinkProof(uid, pid or None, "SO_PEERCRED, not compared")
    return LinkProof()
