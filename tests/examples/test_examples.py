"""The examples as a user runs them: processes, what they print, and their exit codes."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import kvtransport as kvt

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUICKSTART = EXAMPLES / "quickstart.py"
DEMO = EXAMPLES / "prefill_decode.py"


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def started(script: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A running example, which is over when the block is."""
    command = [sys.executable, str(script), *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def finished(script: Path, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )


def still_running(mark: str) -> list[str]:
    """Command lines of living processes that contain the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended while we looked
            continue
        if mark in words:
            found.append(" ".join(words))
    return found


@pytest.mark.parametrize("order", [("recv", "send"), ("send", "recv")])
def test_quickstart(order: tuple[str, str]) -> None:
    address = free_address()
    with started(QUICKSTART, order[0], address) as first:
        time.sleep(1.0)  # long enough for the first to find nobody there
        with started(QUICKSTART, order[1], address) as second:
            output = {order[1]: second.communicate(timeout=60)[0], order[0]: first.communicate(timeout=60)[0]}
    assert (first.returncode, second.returncode) == (0, 0), output
    sentence = r"196608 bytes in \d+\.\d+ s over \w+"
    assert re.search(rf"^sent {sentence}$", output["send"], re.MULTILINE)
    assert re.search(rf"^received {sentence}$", output["recv"], re.MULTILINE)
    holds = re.findall(r"block (\d+) holds their block (\d+)", output["recv"])
    assert holds == [("0", "7"), ("1", "3"), ("2", "21")]


def test_quickstart_notices_other_bytes() -> None:
    address = free_address()
    cache = np.zeros((3, 8, 16, 128), dtype=np.float32)
    with started(QUICKSTART, "recv", address) as receiver, kvt.Endpoint() as endpoint:
        peer = endpoint.connect(address, timeout=60)
        pool = endpoint.register(cache)
        peer.send_blocks(pool, [0, 1, 2], key="request-42", meta=bytes([7, 3, 21])).result(timeout=60)
        output = receiver.communicate(timeout=60)[0]
    assert receiver.returncode == 1
    assert "block 0 is not what was sent" in output


@pytest.mark.timeout(200)
def test_hand_off() -> None:
    run = finished(DEMO, timeout=180)
    assert run.returncode == 0, run.stdout
    assert run.stdout.splitlines()[-1] == "tokens equal: yes (16 requests)"
    assert re.search(r"received 16 requests, \d+ tokens, \d+\.\d MB", run.stdout)
    assert re.search(r"once more, .*: \d+\.\d MB in \d+\.\d ms, \d+\.\d\d GB/s over \w+", run.stdout)
    assert "bytes equal: yes" in run.stdout
    assert "logits equal, bit by bit, to a run without hand-off: yes" in run.stdout
    differing = dict(re.findall(r"control, (.*): (\d+) requests differ", run.stdout))
    assert differing == {"one block swapped": "2", "one layer shifted": "16", "KV zeroed": "16"}
    here = re.search(r"decode \| req-0: (\d+ tokens), into blocks (\[.*\])", run.stdout)
    there = re.search(r"prefill \| req-0: (\d+ tokens), in blocks (\[.*\])", run.stdout)
    assert here is not None
    assert there is not None
    assert here[1] == there[1]
    assert here[2] != there[2]


@pytest.mark.timeout(200)
def test_prefill_is_killed_in_mid_transfer() -> None:
    run = finished(DEMO, "--kill-prefill", timeout=180)
    assert run.returncode == 0, run.stdout
    lines = run.stdout.splitlines()
    assert lines[-1] == "tokens equal: yes (16 requests)"
    told = [line.partition("| ")[2] for line in lines]
    (lost,) = [index for index, line in enumerate(told) if line.startswith("PeerLost: ")]
    assert told.index("SIGKILL to prefill") < lost
    assert lost < told.index("computed the prompts here instead, into the same blocks")
    assert "all 16 transfers have ended, are quiesced, and count none of their blocks as received" in told
    landed, total = map(float, re.findall(r"(\d+\.\d) MB of (\d+\.\d) MB were here", run.stdout)[0])
    assert 0 < landed < total


def test_a_failure_is_told_and_counted(tmp_path: Path) -> None:
    run = finished(DEMO, "--model", str(tmp_path), timeout=100)
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1] == "tokens equal: no"
    assert str(tmp_path) in run.stdout


def test_a_model_that_is_not_there_is_named() -> None:
    run = finished(DEMO, "--model", "/nonexistent", timeout=20)
    assert run.returncode == 2
    assert "--model /nonexistent: no such directory" in run.stdout


@pytest.mark.parametrize(("window", "pages"), [(32, False), (None, True)])
def test_a_model_with_a_sliding_window_is_refused(window: int | None, pages: bool) -> None:
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch, types; from transformers import MistralConfig; from handoff.model import kv_shape;"
            f"config = MistralConfig(sliding_window={window});"
            "print(kv_shape(types.SimpleNamespace(config=config, dtype=torch.float16)))",
        ],
        cwd=DEMO.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (told.returncode == 0) == pages, told.stderr
    assert pages or "sliding_attention" in told.stderr


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_running(ending: signal.Signals) -> None:
    mark = f"97.{ending.value:03}"  # nobody else's timeout: it tells this run's processes from others
    with started(DEMO, "--timeout", mark) as parent:
        assert parent.stdout is not None
        while "req-0" not in parent.stdout.readline():  # one of the two is at work
            assert parent.poll() is None
        assert len(still_running(mark)) == 3
        parent.send_signal(ending)
        parent.wait(timeout=10)
    assert parent.returncode not in (0, None)
    assert still_running(mark) == []
