"""The bench's processes: errors are told, no wait is endless, the limits verify what they move."""

from __future__ import annotations

import os
import shutil
import sys
import time

import pytest

from bench.process import LineProcess, WorkerError

ECHO = """
from bench import protocol

def fail():
    raise ValueError("no such thing")

def twice():
    yield {"n": 1}
    yield {"n": 2}

protocol.serve({"fail": fail, "twice": twice, "hello": lambda: print("to nobody"), "sleep": lambda: __import__("time").sleep(60)}.__getitem__)
"""  # noqa: E501


def start() -> LineProcess:
    process = LineProcess("echo", [sys.executable, "-c", ECHO])
    process.read_reply(30)
    return process


def test_replies_and_errors() -> None:
    with start() as process:
        process.write_line('{"do": "twice"}')
        assert [process.read_reply(10)["n"] for _ in range(2)] == [1, 2]
        process.write_line('{"do": "hello"}')
        assert process.read_reply(10)["ok"]
        process.write_line('{"do": "fail"}')
        with pytest.raises(WorkerError, match="no such thing"):
            process.read_reply(10)


def test_a_silent_worker_is_an_error_in_time() -> None:
    process = start()
    process.write_line('{"do": "sleep"}')
    began = time.monotonic()
    with pytest.raises(WorkerError, match="no answer"):
        process.read_reply(0.5)
    assert time.monotonic() - began < 5
    os.kill(process.pid, 9)
    with pytest.raises(WorkerError, match="has ended"):
        process.read_reply(10)
    process.close()


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_limits_move_and_verify_and_refuse() -> None:
    from bench.raw_limits import find_program

    with LineProcess("kvt_limits", [str(find_program())]) as process:
        for command in (
            "tcp d 2 256k cross",
            "copy d 1",
            "memfd d 1",
            "vmread d 2",
            "tcp c 1 default reps=20",
        ):
            process.write_line(command)
            reply = process.read_reply(60)
            assert reply["verified"], command
            assert reply["nbytes"] == (4096 if "reps" in command else 32768 * 4096)
            assert len(reply["samples_us"]) == (20 if "reps" in command else 0)
        for nonsense in ("tcp zz 1 default", "fly a 1", "tcp a 1 default cc=nonsense", "copy a 999"):
            process.write_line(nonsense)
            with pytest.raises(WorkerError):
                process.read_reply(60)
        process.write_line("copy c 1")
        assert process.read_reply(60)["verified"]
