"""`kvtransport bench serve` in a process of its own, and in a thread."""

import contextlib
import subprocess
import sys
import threading

from kvtransport.cli.bench.serving import Server

MIB = 1 << 20


@contextlib.contextmanager
def serving(*arguments, where="127.0.0.1:0"):
    """Yield (process, address); the process is over when the block is."""
    command = [sys.executable, "-m", "kvtransport", "bench", "serve", where, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().removeprefix("serving at ").strip()
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def served_by_a_thread(endpoint, limit=64 * MIB):
    """Yield the address of a server in this process, which serves one run."""
    address = endpoint.listen("127.0.0.1:0")
    thread = threading.Thread(target=Server(endpoint, limit).serve, args=(True,))
    thread.start()
    try:
        yield address
    finally:
        thread.join(20)
        assert not thread.is_alive()
