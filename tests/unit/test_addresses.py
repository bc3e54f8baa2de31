"""Addresses of the TCP backend: their forms, what is refused without a key, and who is at the other end."""

import contextlib
import errno
import os
import select
import socket
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransport.backends import tcp
from kvtransport.backends.base import Policy
from kvtransport.backends.tcp import TcpBackend, endpoint_of, is_numeric, split_host_port
from kvtransport.errors import AuthenticationError, InsecureConfigError
from kvtransport.protocol.descriptor import Descriptor, is_descriptor, parse_descriptor
from tests.unit.other_user import NOBODY, as_nobody, squatter

STRICT = Policy()
BACKEND = TcpBackend()
LOCAL = ["127.0.0.1:0", "[::1]:0", "localhost:0", "unix"]
ZERO = "0" * 32 + "@"


@pytest.fixture
def where(request, tmp_path):
    return f"unix:{tmp_path}/socket" if request.param == "unix" else request.param


def connected(where, policy=STRICT):
    """Return (listener, dialled socket, accepted socket)."""
    listener = BACKEND.listen(where, policy)
    dialled = dial(listener.target.text)
    return listener, dialled, accept(listener)


def dial(where):
    sock = BACKEND.dial(BACKEND.resolve(where)[0])
    assert select.select([], [sock], [], 10)[1]
    BACKEND.dialled(sock)
    return sock


def accept(listener):
    assert select.select([listener], [], [], 10)[0]
    with socket.socket(fileno=os.dup(listener.fileno())) as sock:
        return sock.accept()[0]


# --- forms ---


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("127.0.0.1:7000", ("127.0.0.1", 7000)),
        ("[::1]:0", ("::1", 0)),
        ("[fe80::1%eth0]:65535", ("fe80::1%eth0", 65535)),
        ("node-3.cluster:7000", ("node-3.cluster", 7000)),
    ],
)
def test_forms(where, expected):
    assert split_host_port(where) == expected
    assert BACKEND.serves(where)


@pytest.mark.parametrize(
    "where",
    [
        "",
        ":",
        "127.0.0.1",
        "127.0.0.1:",
        ":7000",
        "::1:7000",
        "a:65536",
        "a:-1",
        "a:\u0661",
        "a:7000 ",
        "[]:1",
    ],
)
def test_malformed(where):
    with pytest.raises(ValueError, match="address is written"):
        split_host_port(where)


@pytest.mark.parametrize("where", ["unix:", "unix:/" + "a" * 107, "unix:/a\0b"])
def test_malformed_paths(where):
    with pytest.raises(ValueError, match="107 bytes"):
        BACKEND.resolve(where)


def test_only_names_ask_a_name_service():
    assert is_numeric("127.0.0.1:1")
    assert is_numeric("[::1]:1")
    assert is_numeric("[fe80::1%lo]:1")
    assert is_numeric("unix:/a")
    assert not is_numeric("localhost:1")


def test_mapped_addresses_are_what_they_are():
    assert endpoint_of(("::ffff:127.0.0.1", 7, 0, 0)) == endpoint_of(("127.0.0.1", 7))
    assert endpoint_of(("::ffff:127.0.0.1", 7, 0, 0))[0].is_loopback


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_a_value_error(text):
    try:
        host, port = split_host_port(text)
    except ValueError:
        return
    assert host
    assert 0 <= port <= 65535


# --- descriptors ---


@given(
    st.binary(min_size=16, max_size=16),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), max_size=16),
)
def test_descriptors_survive(incarnation, addresses):
    descriptor = Descriptor(incarnation, tuple(addresses))
    text = str(descriptor)
    assert text.isprintable()
    assert " " not in text
    assert is_descriptor(text)
    if len(text) <= 8192:
        assert parse_descriptor(text) == descriptor


def test_descriptor_is_pinned():
    text = "kvt1:000102030405060708090a0b0c0d0e0f@127.0.0.1:7000,[::1]:7000,unix:/run/a%2Cb%20c"
    assert str(parse_descriptor(text)) == text
    assert parse_descriptor(text).addresses == ("127.0.0.1:7000", "[::1]:7000", "unix:/run/a,b c")


@pytest.mark.parametrize(
    "text",
    ["kvt1:", "kvt1:00@a", "kvt2:" + ZERO, "kvt1:" + ZERO + "a," * 17]
    + ["kvt1:" + ZERO + end for end in ("%ff", "a b", "a" * 9000)],
    ids=lambda t: t[:8] + t[-4:],
)
def test_malformed_descriptors(text):
    assert is_descriptor(text)
    with pytest.raises(ValueError):
        parse_descriptor(text)


# --- listening ---


@pytest.mark.parametrize("where", ["0.0.0.0:0", "[::]:0"])
def test_beyond_the_host_needs_a_key(where, monkeypatch, caplog):
    opened = []
    monkeypatch.setattr(tcp.socket, "socket", lambda *a, **k: opened.append(a))
    with pytest.raises(InsecureConfigError, match="insecure=True"):
        BACKEND.listen(where, STRICT)
    with pytest.raises(InsecureConfigError):
        BACKEND.demand_allowed(BACKEND.resolve("192.0.2.1:7000")[0], STRICT)
    assert not opened
    assert not caplog.records


def test_insecure_warns_every_time(caplog):
    for _ in range(3):
        BACKEND.listen("0.0.0.0:0", Policy(insecure=True)).close()
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 3
    BACKEND.listen("0.0.0.0:0", Policy(keyed=True)).close()
    assert len(caplog.records) == 3


@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0"])
def test_loopback_is_never_paced(where):
    def congestion(sock):
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")

    listener, dialled, accepted = connected(where)
    with contextlib.closing(listener), dialled, accepted:
        assert congestion(dialled) == congestion(accepted) == b"reno"


@pytest.mark.parametrize("where", LOCAL, indirect=True)
def test_listen_dial_and_prove(where):
    listener, dialled, accepted = connected(where)
    with dialled, accepted:
        for sock in (dialled, accepted):
            proof = BACKEND.prove(sock, STRICT)
            assert proof is not None
            assert proof.uid == os.geteuid()
            assert sock.get_inheritable() is False
        if where.startswith("unix:"):
            assert BACKEND.prove(accepted, STRICT).pid == os.getpid()
            assert stat.S_IMODE(os.stat(where[5:]).st_mode) == 0o600
        else:
            assert dialled.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert not listener.target.text.endswith(":0")
    listener.close()
    listener.close()
    assert not where.startswith("unix:") or not os.path.exists(where[5:])


def test_a_dead_sockets_path_is_taken_over(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    listener, dialled, accepted = connected("unix:" + path)
    for sock in (dialled, accepted, listener):
        sock.close()


def test_a_living_sockets_path_is_not(tmp_path):
    first = BACKEND.listen(f"unix:{tmp_path}/s", STRICT)
    with pytest.raises(OSError, match="can't listen") as caught:
        BACKEND.listen(f"unix:{tmp_path}/s", STRICT)
    assert caught.value.errno == errno.EADDRINUSE
    first.close()


def test_a_file_is_not_removed(tmp_path):
    (tmp_path / "s").write_text("mine")
    with pytest.raises(OSError, match="can't listen"):
        BACKEND.listen(f"unix:{tmp_path}/s", STRICT)
    assert (tmp_path / "s").read_text() == "mine"


def test_a_successors_path_is_left_alone(tmp_path):
    where = f"unix:{tmp_path}/s"
    first = BACKEND.listen(where, STRICT)
    os.unlink(tmp_path / "s")
    second = BACKEND.listen(where, STRICT)
    first.close()
    dial(where).close()
    second.close()


def test_refused_and_self_connected():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    sock = BACKEND.dial(BACKEND.resolve(f"127.0.0.1:{port}")[0])
    with sock:
        select.select([], [sock], [], 10)
        with pytest.raises(ConnectionRefusedError):
            BACKEND.dialled(sock)
    with socket.socket() as itself:
        itself.bind(("127.0.0.1", 0))
        itself.connect(itself.getsockname())
        with pytest.raises(ConnectionRefusedError):
            BACKEND.dialled(itself)


# --- who is there ---


@pytest.mark.parametrize("row", [tcp._row_by_diag, tcp._row_by_proc])
@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0"])
def test_both_ways_to_ask_agree(row, where):
    listener, dialled, accepted = connected(where)
    with dialled, accepted:
        a, b = endpoint_of(dialled.getsockname()), endpoint_of(accepted.getsockname())
        for place, other, sock in ((a, b, dialled), (b, a, accepted)):
            found = row(place, other)
            assert (found.state, found.uid) == (tcp.TCP_ESTABLISHED, os.geteuid())
            assert found.inode == os.fstat(sock.fileno()).st_ino
    listener.close()


def test_an_ipv4_client_of_a_dual_socket_is_found():
    with socket.socket(socket.AF_INET6) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", 0))
        server.listen()
        with dial(f"127.0.0.1:{server.getsockname()[1]}") as dialled, server.accept()[0] as accepted:
            assert BACKEND.prove(accepted, STRICT).uid == os.geteuid()
            assert BACKEND.prove(dialled, STRICT).uid == os.geteuid()
            a, b = endpoint_of(accepted.getsockname()), endpoint_of(accepted.getpeername())
            assert tcp._row_by_proc(a, b).inode == os.fstat(accepted.fileno()).st_ino


def test_before_accept_nothing_is_known():
    listener = BACKEND.listen("127.0.0.1:0", STRICT)
    with dial(listener.target.text) as dialled:
        assert BACKEND.prove(dialled, STRICT) is None
        with accept(listener):
            assert BACKEND.prove(dialled, STRICT) is not None
    listener.close()


def test_a_closed_other_end_proves_nothing():
    listener, dialled, accepted = connected("127.0.0.1:0")
    with accepted:
        dialled.close()
        assert BACKEND.prove(accepted, STRICT) is None
    listener.close()


def test_who_listens():
    listener = BACKEND.listen("127.0.0.1:0", STRICT)
    target = BACKEND.resolve(listener.target.text)[0]
    assert BACKEND.owner(target) == os.geteuid()
    listener.close()
    assert BACKEND.owner(target) is None


def test_beyond_loopback_proves_nothing(monkeypatch):
    listener, dialled, accepted = connected("127.0.0.1:0")
    monkeypatch.setattr(tcp, "endpoint_of", lambda addr: endpoint_of(("192.0.2.1", addr[1])))
    with dialled, accepted:
        with pytest.raises(AuthenticationError, match="key"):
            BACKEND.prove(accepted, STRICT)
        assert BACKEND.prove(accepted, Policy(insecure=True)).uid is None
        assert BACKEND.prove(accepted, Policy(keyed=True)).uid is None
    listener.close()


@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0", "unix"], indirect=True)
def test_m19_another_user_dials_us(where, tmp_path):
    listener = BACKEND.listen(where, STRICT)
    if where.startswith("unix:"):
        os.chmod(where[5:], 0o666)
        for parent in (tmp_path, *tmp_path.parents[:-1]):
            os.chmod(parent, os.stat(parent).st_mode | 0o011)
    reading, writing = os.pipe()
    child = as_nobody(lambda: (dial(listener.target.text), os.close(writing), os.read(reading, 1)))
    os.close(reading)
    with accept(listener) as accepted:
        with pytest.raises(AuthenticationError, match=f"uid {NOBODY}.*run both ends as one user") as caught:
            BACKEND.prove(accepted, STRICT)
        assert "insecure=True" in str(caught.value)
        assert BACKEND.prove(accepted, Policy(insecure=True)) is not None
    os.close(writing)
    assert os.waitpid(child, 0)[1] == 0
    listener.close()


@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0"])
def test_m19_another_user_squats_the_port(where):
    host = split_host_port(where)[0]
    with squatter(host) as (port, accepted):
        text = where.replace(":0", f":{port}")
        assert BACKEND.owner(BACKEND.resolve(text)[0]) == NOBODY
        with dial(text) as dialled:
            assert accepted()
            with pytest.raises(AuthenticationError, match=f"uid {NOBODY}"):
                BACKEND.prove(dialled, STRICT)


def test_the_fallback_where_netlink_is_not_allowed(monkeypatch):
    monkeypatch.setattr(tcp, "_NETLINK_SOCK_DIAG", 31)  # no such protocol
    listener, dialled, accepted = connected("127.0.0.1:0")
    with dialled, accepted:
        assert BACKEND.prove(accepted, STRICT).uid == os.geteuid()
    listener.close()


def test_an_unmapped_user_is_not_nobody(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    monkeypatch.setattr(tcp, "_may_be_anyone", lambda uid: uid == NOBODY)
    with pytest.raises(AuthenticationError):
        tcp._demand_same_user(NOBODY, "it")


def test_proofs_from_many_threads():
    listener, dialled, accepted = connected("127.0.0.1:0")
    found = []
    threads = [
        threading.Thread(target=lambda: found.extend(BACKEND.prove(accepted, STRICT).uid for _ in range(50)))
        for _ in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert found == [os.geteuid()] * 400
    dialled.close(), accepted.close(), listener.close()
