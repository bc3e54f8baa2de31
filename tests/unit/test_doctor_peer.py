"""`kvtransport doctor --peer`: every way by itself, to peers that are there, aren't, or are somebody else."""

import contextlib
import json
import socket
import threading

import kvtransport as kvt
from kvtransport.cli import main
from kvtransport.cli.peer import MESSAGE, MESSAGES, lines, try_ways
from kvtransport.types import BACKENDS
from tests.unit.other_user import squatter


def test_a_peer_that_is_reached(endpoint):
    peer = endpoint()
    ways = try_ways(peer.listen("127.0.0.1:0"))
    assert set(ways) == set(BACKENDS)
    way = ways["tcp"]
    assert way.reached
    assert way.reason == ""
    assert 0 < way.round_trip_us < 10e6
    assert "host memory: tcp" in way.explain
    came = peer.recv_messages(timeout=10)
    while len(came) < MESSAGES:
        came += peer.recv_messages(timeout=10)
    assert [data for _, data in came] == [MESSAGE] * MESSAGES


def test_shared_memory_where_the_session_has_it(endpoint):
    way = try_ways(endpoint(backends=("shm", "tcp")).listen("127.0.0.1:0"))["shm"]
    assert way.reached
    assert way.round_trip_us > 0
    assert "host memory: shm" in way.explain


def test_shared_memory_where_the_peer_does_not_allow_it(endpoint):
    ways = try_ways(endpoint(backends=("tcp",)).listen("127.0.0.1:0"))
    assert ways["tcp"].reached
    assert not ways["shm"].reached
    assert ways["shm"].reason == "not among the peer's backends"


def test_inproc_is_not_for_another_process(endpoint):
    way = try_ways(endpoint().listen("127.0.0.1:0"))["inproc"]
    assert not way.reached
    assert "one process" in way.reason


def test_no_message_where_none_is_wanted(endpoint, capsys):
    peer = endpoint()
    assert main(["doctor", "--peer", peer.listen("127.0.0.1:0"), "--no-message", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["peer"]["ways"]["tcp"]
    assert told["reached"]
    assert told["round_trip_us"] is None
    peer.accept(timeout=10)
    assert peer.recv_messages(timeout=0) == []


def test_over_a_unix_socket(endpoint, tmp_path):
    assert try_ways(endpoint().listen(f"unix:{tmp_path}/socket"))["tcp"].reached


def test_nobody_listens(free_port, capsys):
    assert main(["doctor", "--peer", f"127.0.0.1:{free_port}", "--timeout", "0.2"]) == 1
    text = capsys.readouterr().out
    assert "tcp       not reached: ConnectTimeout: " in text
    assert "Connection refused" in text
    assert "-> see that an endpoint listens there" in text


def test_an_address_that_is_none():
    way = try_ways("nonsense")["tcp"]
    assert not way.reached
    assert "is no address" in way.reason
    assert way.remedy == "correct the address"


def test_beyond_the_host_without_leave():
    way = try_ways("192.0.2.1:7000")["tcp"]
    assert way.reason.startswith("InsecureConfigError: ")
    assert "--insecure" in way.remedy


def test_another_user_listens():
    with squatter("127.0.0.1") as (port, _accepted):
        way = try_ways(f"127.0.0.1:{port}", timeout=5)["tcp"]
    assert way.reason.startswith("AuthenticationError: ")
    assert "one user" in way.remedy


def test_something_else_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def answer():
            with server.accept()[0] as sock, contextlib.suppress(ConnectionError):
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                while sock.recv(4096):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        way = try_ways(f"127.0.0.1:{server.getsockname()[1]}", timeout=5)["tcp"]
        thread.join(10)
    assert way.reason.startswith("RemoteProtocolError: ")
    assert "something else" in way.remedy


def test_a_peer_that_confirms_nothing_is_not_reached(endpoint, monkeypatch):
    def give_up(message, timeout=None):
        raise kvt.WaitTimeout(f"no result within {timeout} s")

    monkeypatch.setattr(kvt.SentMessage, "result", give_up)
    way = try_ways(endpoint().listen("127.0.0.1:0"), timeout=5)["tcp"]
    assert not way.reached
    assert way.reason == "WaitTimeout: no result within 5 s"
    assert "hangs" in way.remedy


def test_the_text(endpoint):
    address = endpoint().listen("127.0.0.1:0")
    told = lines(address, try_ways(address))
    assert told[0] == f"ways to {address}"
    assert any(line.startswith("  tcp       reached, round trip of a message ") for line in told)
