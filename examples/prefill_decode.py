"""Disaggregated inference on one machine: one process computes the prompts, another goes on with its KV.

    python examples/prefill_decode.py                    a small Llama with random weights, on the CPU
    python examples/prefill_decode.py --model DIR        any local transformers model with full attention
    python examples/prefill_decode.py --kill-prefill     SIGKILL to prefill in mid-transfer, and what then

or the two processes in two terminals of your own, either one first, within --timeout seconds of one another:

    python examples/prefill_decode.py decode --listen 127.0.0.1:7001
    python examples/prefill_decode.py prefill --connect 127.0.0.1:7001

The two processes are handoff/prefill.py and handoff/decode.py; here are the options, and the parent that
starts both and watches them. It exits with 0 only if every check held.
"""

from __future__ import annotations

import argparse
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# What the parent looks for in its children's lines.
LISTENING = "listening on "
FIRST_PROGRESS = "layer 1 of "
VERDICT = "tokens equal: "


def main() -> int:
    options = parse_options()
    # Else SIGTERM would end the parent without the `finally` that ends its children.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return Parent(options).run() if options.role == "both" else run_role(options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="KV cache hand-off from a prefill to a decode process")
    add = parser.add_argument
    add("role", nargs="?", choices=("both", "prefill", "decode"), default="both")
    add("--model", metavar="DIR", help="a local model directory (default: a small Llama, random weights)")
    add("--kill-prefill", action="store_true", help="kill prefill in mid-transfer")
    add("--listen", metavar="ADDRESS", default="127.0.0.1:0", help="where decode listens")
    add("--connect", metavar="ADDRESS", help="where prefill finds decode")
    add("--layer-delay", type=float, default=0.0, help="seconds to add to each layer of prefill")
    add("--threads", type=int, default=1, help="torch threads, the same on both sides (default 1)")
    add("--timeout", type=float, default=120.0, help="seconds until everything gives up (default 120)")
    options = parser.parse_args()
    if options.role == "prefill" and options.connect is None:
        parser.error("prefill needs --connect")
    if options.model is not None and not Path(options.model).is_dir():
        parser.error(f"--model {options.model}: no such directory")
    return options


def run_role(options: argparse.Namespace) -> int:
    """One of the two processes. Torch takes seconds to import, so the endpoint comes first."""
    import kvtransport as kvt

    with kvt.Endpoint() as endpoint:
        if options.role == "decode":
            print(LISTENING + endpoint.listen(options.listen), flush=True)
            from handoff.decode import run
        else:
            from handoff.prefill import run
        from handoff.checks import CheckFailed

        try:
            run(endpoint, options)
        except CheckFailed as failure:
            print(f"check failed: {failure}\n{VERDICT}no", flush=True)
            return 1
    return 0


class Parent:
    """Starts decode, then prefill when decode's address is known; relays their lines; leaves no process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._deadline: float = time.monotonic() + options.timeout
        self._lines: queue.Queue[tuple[str, str | None]] = queue.Queue()
        self._children: dict[str, subprocess.Popen[str]] = {}

    def run(self) -> int:
        try:
            verdict = self._watch()
            codes = {name: child.wait(timeout=self._left()) for name, child in self._children.items()}
        except (queue.Empty, subprocess.TimeoutExpired):
            print(f"gave up after {self._options.timeout:.0f} s\n{VERDICT}no", flush=True)
            return 1
        finally:
            for child in self._children.values():
                child.kill()
                child.wait()
        expected = {"decode": 0, "prefill": -signal.SIGKILL if self._options.kill_prefill else 0}
        if codes != expected:
            print(f"exit codes {codes}, expected {expected}", flush=True)
        print(verdict, flush=True)
        return 0 if codes == expected and verdict.startswith(f"{VERDICT}yes") else 1

    def _watch(self) -> str:
        """Relays the children's output until both have closed it; returns the verdict, to be printed last."""
        verdict = f"{VERDICT}no"
        self._start("decode", "--listen", self._options.listen)
        for name, line in self._events():
            if line.startswith(VERDICT):
                verdict = line
                continue
            print(f"{name:>7} | {line}", flush=True)
            if line.startswith(LISTENING):
                self._start("prefill", "--connect", line.removeprefix(LISTENING))
            elif line.startswith(FIRST_PROGRESS) and self._options.kill_prefill:
                self._children["prefill"].kill()
                print(" parent | SIGKILL to prefill", flush=True)
        return verdict

    def _start(self, role: str, *address: str) -> None:
        options = self._options
        # Where prefill is to be killed, its layers are stretched: a slow parent, too, must hit a transfer.
        delay = max(options.layer_delay, 0.3) if options.kill_prefill else options.layer_delay
        command = [sys.executable, __file__, role, *address, "--layer-delay", str(delay)]
        command += ["--threads", str(options.threads), "--timeout", str(options.timeout)]
        command += ["--model", options.model] if options.model else []
        command += ["--kill-prefill"] if options.kill_prefill else []
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._children[role] = child
        threading.Thread(target=self._read, args=(role, child), daemon=True).start()

    def _read(self, role: str, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            self._lines.put((role, line.rstrip("\n")))
        self._lines.put((role, None))

    def _events(self) -> Iterator[tuple[str, str]]:
        """(role, line) until both have closed their output; queue.Empty at the deadline."""
        ended: set[str] = set()
        while ended != self._children.keys():
            role, line = self._lines.get(timeout=self._left())
            if line is None:
                ended.add(role)
                self._end_others(role)
            else:
                yield role, line

    def _end_others(self, role: str) -> None:
        """Where one side has failed, the other would wait for it until its timeout."""
        code = self._children[role].wait(timeout=self._left())
        if code != 0 and not (role == "prefill" and self._options.kill_prefill):
            for name, child in self._children.items():
                if name != role:
                    child.terminate()

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.0)


if __name__ == "__main__":
    sys.exit(main())
