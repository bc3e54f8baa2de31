"""The lines that the README shows in "When it goes wrong" are those that a user sees: each is provoked.

Numbers may differ, and `...` stands for the rest.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import kvtransport as kvt

README = Path(__file__).resolve().parents[2] / "README.md"

PEER = """
import kvtransport as kvt

with kvt.Endpoint() as endpoint:
    print(endpoint.listen("127.0.0.1:0"), flush=True)
    endpoint.accept(timeout=60)
    endpoint.recv_messages(timeout=60)
"""

NOT_PROVOKED = {
    "IntegrityError": "needs a flipped bit: see the faults' tests",
    "BackendUnavailable": "needs a CUDA tensor",
}


def shown() -> list[str]:
    section = README.read_text(encoding="utf-8").split("## When it goes wrong")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("|")]
    return [span for row in rows for span in re.findall(r"`([A-Z]\w+(?:: [^`]+)?)`", row[2])]


def pattern(line: str) -> str:
    escaped = re.escape(line).replace(re.escape("..."), ".*")
    return re.sub(r"(?:\d+(?:\\\.)?)+", r"[\\d.]+", escaped) + "$"


def line_of(call: Callable[[], object]) -> str:
    with pytest.raises((kvt.KVTransportError, kvt.WaitTimeout, OSError)) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


@contextmanager
def peer() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen([sys.executable, "-c", PEER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def of_endpoints() -> Iterator[str]:
    with kvt.Endpoint() as endpoint, kvt.Endpoint() as other:
        taken = endpoint.listen("127.0.0.1:0")
        yield line_of(lambda: other.listen(taken))
        yield line_of(lambda: other.listen("0.0.0.0:0"))
        with kvt.Endpoint() as gone:
            nobody = gone.listen("127.0.0.1:0")
        yield line_of(lambda: other.connect(nobody, timeout=0.2))


def of_transfers() -> Iterator[str]:
    with kvt.Endpoint() as prefill, kvt.Endpoint() as decode:
        there = prefill.connect(decode.listen("127.0.0.1:0"))
        here = decode.accept()
        source = prefill.register(np.zeros((4, 64), dtype=np.uint8))
        pool = decode.register([np.zeros((4, 64), dtype=np.uint8)])
        yield line_of(here.recv_blocks(pool, [0], key="request-42", match_timeout_s=0.1).result)

        gate = prefill.layer_gate(1)
        there.send_blocks(source, [0], key="g", after=gate)
        yield line_of(here.recv_blocks(pool, [0], key="g", match_timeout_s=0.1).result)

        there.send_blocks(source, [0, 1], key="mm")
        yield line_of(here.recv_blocks(pool, [0], key="mm").result)

        here.recv_blocks(pool, [3], key="d")
        yield line_of(lambda: here.recv_blocks(pool, [2], key="d"))
        here.recv_blocks(pool, [0], key="d2")
        yield line_of(lambda: here.recv_blocks(pool, [0], key="d3"))

        refused = here.recv_blocks(pool, [1], key="rf")
        there.refuse("rf", "prefill ran out of memory")
        yield line_of(refused.result)


def of_lost_peers() -> Iterator[str]:
    for deed in (signal.SIGKILL, signal.SIGSTOP):
        with peer() as (process, address), kvt.Endpoint() as endpoint:
            connection = endpoint.connect(address)
            pool = endpoint.register(np.zeros((4, 64), dtype=np.uint8))
            transfer = connection.recv_blocks(pool, [0], key="x")
            process.send_signal(deed)
            yield line_of(lambda transfer=transfer: transfer.result(timeout=10))


def test_each_line_is_one_that_a_user_sees() -> None:
    seen = [*of_endpoints(), *of_transfers(), *of_lost_peers()]
    lines = [line for line in shown() if line.partition(":")[0] not in NOT_PROVOKED]
    assert len(lines) >= 10
    missing = [line for line in lines if not any(re.match(pattern(line), text, re.DOTALL) for text in seen)]
    assert missing == [], "\n".join(seen)


def test_lines_that_are_not_provoked_name_real_errors() -> None:
    assert {line.partition(":")[0] for line in shown()} >= set(NOT_PROVOKED)
    assert all(hasattr(kvt, name) for name in NOT_PROVOKED)
