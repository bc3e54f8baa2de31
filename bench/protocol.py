"""The worker's end of the bench's own protocol: one JSON object a line, commands on stdin, replies on
stdout.

A command is {"do": NAME, ...arguments}. A reply is {"ok": true, ...} or {"ok": false, "error": ...}. A
handler that is a generator gives several replies: the harness reads one for each. End of input ends the
worker, and so does the harness's death.

Peers' workers run this in their own venv: nothing but the standard library is imported here.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from types import GeneratorType
from typing import Any

Reply = Mapping[str, Any]
Handler = Callable[..., Any]

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the harness ends in whatever way: no worker is left behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Channel:
    """Replies on what was stdout. Libraries that print go to stderr instead, so they can't break a line."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, reply: Reply) -> None:
        self._out.write(json.dumps(reply) + "\n")
        self._out.flush()


def _replies(result: Any) -> Iterable[Reply]:
    if isinstance(result, GeneratorType):
        for reply in result:
            yield reply or {}
    else:
        yield result or {}


def serve(find: Callable[[str], Handler]) -> None:
    """Answer commands until the input ends. `find` returns a command's handler or raises LookupError."""
    die_with_parent()
    channel = Channel()
    channel.send({"ok": True, "pid": os.getpid()})
    for line in sys.stdin:
        try:
            command = json.loads(line)
            handler = find(command.pop("do"))
            for reply in _replies(handler(**command)):
                channel.send({"ok": True, **reply})
        except Exception as error:
            channel.send(
                {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            )
