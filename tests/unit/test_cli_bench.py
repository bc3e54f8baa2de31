"""`kvtransport bench serve` and `run`: real bytes between two processes, checked; bounded, and told what is wrong."""

import json
import signal
import subprocess
import sys

import pytest

import kvtransport as kvt
from kvtransport.cli import main
from kvtransport.cli.bench import control, verbs
from kvtransport.cli.bench.arena import Arena
from kvtransport.cli.bench.control import Asking, BenchError, Close, Moved, Open, Opened, Round
from tests.unit.bench_server import MIB, served_by_a_thread, serving

SCALES = {"a": "64", "b": "8", "c": "512", "d": "256", "e": "32"}


def run(address, *arguments):
    return main(["bench", "run", address, *arguments])


@pytest.fixture(scope="module")
def server():
    with serving("--memory-limit", "192MiB") as (_, address):
        yield address


# --- what it measures ---


@pytest.mark.parametrize("case", ["a", "d", "e"])
def test_bandwidth(server, capsys, case):
    assert run(server, "--case", case, "--scale", SCALES[case], "--rounds", "2", "--json", "-") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["case"], told["verb"], told["backend"], told["rounds"]) == (case, "recv", "shm", 2)
    assert told["verified"] is True
    rates = told["gb_per_s"]
    assert 0 < rates["least"] <= rates["median"] <= rates["most"]
    assert min(told["cpu_s_per_gb"].values()) >= 0
    assert set(told["cpu_s_per_gb"]) == {"here", "there"}
    assert told["latency_us"] is None
    assert "host memory: shm" in told["explain"]
    assert told["versions"] == {"here": kvt.__version__, "there": kvt.__version__}


@pytest.mark.parametrize("case", ["b", "c"])
def test_latency(server, capsys, case):
    assert run(server, "--case", case, "--scale", SCALES[case], "--rounds", "2", "--json", "-") == 0
    told = json.loads(capsys.readouterr().out)
    assert 0 < told["latency_us"]["p50"] <= told["latency_us"]["p99"]
    assert (
        told["latency_us"]["count"] == {"b": 2 * 52, "c": 2 * 64}[case]
    )  # 64 and 80 transfers, less a fifth
    assert told["gb_per_s"] is None


def test_two_processes_a_unix_socket_and_a_file(tmp_path):
    file = tmp_path / "figures.json"
    with serving("--once", where=f"unix:{tmp_path}/socket") as (process, address):
        command = [sys.executable, "-m", "kvtransport", "bench", "run", address, "--backend", "tcp"]
        options = ["--scale", "64", "--rounds", "1", "--protection", "digest", "--json", str(file)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert process.wait(20) == 0
    assert done.stderr == ""
    assert done.stdout.startswith("case a: 512 MiB in pieces of 64 KiB, divided by 64: not to be compared\n")
    assert "every byte checked" in done.stdout
    assert "protection digest" in json.loads(file.read_text())["explain"]


# --- what it refuses ---


def test_a_case_beyond_the_memory_limit(server, capsys):
    assert run(server, "--case", "a", "--scale", "2") == 1
    said = capsys.readouterr().err
    assert "takes 536870912 bytes, and the limit is 201326592" in said
    assert "--memory-limit" in said
    assert run(server, "--scale", "64", "--rounds", "1") == 0  # and serves on


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "z"], "case 'z' is unknown; the cases are a, b, c, d, e"),
        (["--case", "a", "--scale", "513"], "can't be divided by 513"),
        (["--verb", "fly"], "verb 'fly' is unknown; the verbs are recv"),
        (["--backend", "inproc"], "NoCommonPath"),
    ],
)
def test_what_the_runner_refuses_itself(server, capsys, arguments, words):
    assert run(server, *arguments) == 1
    assert words in capsys.readouterr().err


def test_nobody_serves(free_port, capsys):
    assert run(f"127.0.0.1:{free_port}", "--timeout", "0.2") == 1
    assert "Connection refused" in capsys.readouterr().err


@pytest.fixture
def asking(server, endpoint):
    one = endpoint()
    return Asking(one, one.connect(server))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Open(control.PROTOCOL, "z", "recv"), "case 'z' is unknown"),
        (Open(control.PROTOCOL, "a", "fly"), "verb 'fly' is unknown"),
        (Open(control.PROTOCOL, "a", "recv"), "the limit is"),
        (Open(control.PROTOCOL, "a", "recv", 1 << 20), "can't be divided"),
        (Open(control.PROTOCOL, "a", "recv", 0), "not a request of the bench"),
        (Open(control.PROTOCOL + 1, "a", "recv", 64), "the same version"),
        (Open(control.PROTOCOL, "a" * 17, "recv", 64), "not a request of the bench"),
        (Round(1), "no run of yours"),
        (Close(), "no run of yours"),
        (Round(1 << 32), "not a request of the bench"),
        (Opened("0.1.0"), "not a request of the bench"),
    ],
)
def test_what_the_server_refuses(asking, request_, words):
    with pytest.raises(BenchError, match=words):
        asking.ask(request_)


@pytest.mark.parametrize("data", [b"", b"kvtransport doctor", b'{"type":"close","more":1}', b"[" * 100_000])
def test_bytes_that_are_no_request(server, endpoint, monkeypatch, data):
    one = endpoint()
    monkeypatch.setattr(control, "encode", lambda request: data)
    with pytest.raises(BenchError, match="not a request of the bench"):
        Asking(one, one.connect(server)).ask(Close())


def test_one_run_at_a_time(server, asking, capsys):
    asking.ask(Open(control.PROTOCOL, "a", "recv", 64))
    assert run(server, "--scale", "64") == 1
    assert "another run goes on here" in capsys.readouterr().err
    asking.ask(Close())
    assert run(server, "--scale", "64", "--rounds", "1") == 0


# --- when it ends ---


def test_ctrl_c_ends_the_server(tmp_path):
    with serving(where=f"unix:{tmp_path}/socket") as (process, address):
        assert address == f"unix:{tmp_path}/socket"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_without_a_word(endpoint):
    with serving("--once") as (process, address):
        one = endpoint()
        Asking(one, one.connect(address)).ask(Open(control.PROTOCOL, "a", "recv", 64))
        one.close()
        assert process.wait(20) == 1


def test_a_server_that_dies(endpoint):
    with serving() as (process, address):
        one = endpoint()
        asking = Asking(one, one.connect(address))
        asking.ask(Open(control.PROTOCOL, "a", "recv", 64))
        process.kill()
        with pytest.raises(kvt.KVTransportError):
            asking.ask(Round(1))


def test_an_address_that_is_taken(server, capsys):
    assert main(["bench", "serve", server]) == 1
    assert "Address already in use" in capsys.readouterr().err


# --- that it finds wrong bytes ---


def test_a_source_with_a_wrong_byte(endpoint, monkeypatch, capsys):
    fill = Arena.fill

    def fill_wrong(arena):
        fill(arena)
        arena.tensors[3, :, 100] ^= 1

    monkeypatch.setattr(Arena, "fill", fill_wrong)
    with served_by_a_thread(endpoint()) as address:
        assert run(address, "--scale", "64", "--rounds", "1", "--backend", "tcp") == 1
    assert "4 blocks hold wrong bytes" in capsys.readouterr().err


def test_a_block_that_is_filled_without_leave(endpoint, monkeypatch, capsys):
    destination = verbs.RecvVerb.destination

    def destination_and_more(verb, end, seed, ask):
        sample = destination(verb, end, seed, ask)
        untouched = set(range(end.case.blocks)) - set(end.case.block_ids(seed, "destination").ravel())
        end.arena.tensors[0, untouched.pop(), -1] = 1
        return sample

    monkeypatch.setattr(verbs.RecvVerb, "destination", destination_and_more)
    with served_by_a_thread(endpoint()) as address:
        assert run(address, "--scale", "64", "--rounds", "1", "--backend", "tcp") == 1
    assert "1 blocks hold wrong bytes" in capsys.readouterr().err


def test_an_answer_that_does_not_fit(endpoint, monkeypatch, capsys):
    monkeypatch.setattr(
        verbs.RecvVerb, "source", lambda verb, end, seed: (_sent(end, seed), Moved([], 0.0))[1]
    )
    with served_by_a_thread(endpoint(), 64 * MIB) as address:
        assert run(address, "--scale", "64", "--rounds", "1", "--backend", "tcp") == 1
    assert "doesn't fit what was asked" in capsys.readouterr().err


def _sent(end, seed):
    for i, ids in enumerate(end.case.block_ids(seed, "source")):
        end.connection.send_blocks(end.pool, ids, key=f"bench-{seed}-{i}").result(20)
