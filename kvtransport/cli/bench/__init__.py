"""`kvtransport bench serve` and `kvtransport bench run`: how fast blocks move between two processes, or two hosts.

Here: their arguments, what they print, their exit status. Not here: serving (`serving`), running (`running`).
This is for users' machines; the bench of the source tree (bench/) compares with limits and other libraries.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from kvtransport.config import Config
from kvtransport.types import BACKENDS

DEFAULT_ROUNDS: Final = 7
DEFAULT_LIMIT: Final = "4GiB"
_UNITS: Final = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them. Cases and verbs are checked when numpy is there."""
    commands = parser.add_subparsers(required=True, metavar="SIDE")
    server = commands.add_parser("serve", help="hold the source's memory and send from it")
    _add_shared(server, "where to listen: 127.0.0.1:7000, unix:/path; port 0 takes a free one")
    server.add_argument("--once", action="store_true", help="end when the first run is over")
    server.add_argument(
        "--memory-limit",
        type=size,
        default=DEFAULT_LIMIT,
        metavar="SIZE",
        help="of memory for a run, in bytes or like 512MiB (%(default)s)",
    )
    server.set_defaults(run=_serve)
    runner = commands.add_parser("run", help="receive from a server, check every byte, print figures")
    _add_shared(runner, "where a server listens")
    runner.add_argument(
        "--case", default="a", help="a, b, c, d or e, see docs/reference/cli.md (%(default)s)"
    )
    runner.add_argument("--verb", default="recv", help="recv: both sides post (%(default)s)")
    runner.add_argument("--rounds", type=positive, default=DEFAULT_ROUNDS, help="to count (%(default)s)")
    runner.add_argument(
        "--scale", type=positive, default=1, help="divide the case's blocks by it (%(default)s)"
    )
    runner.add_argument("--timeout", type=float, default=10.0, help="to connect, in seconds (%(default)s)")
    runner.add_argument(
        "--json", metavar="FILE", help="write the figures as JSON; -: to stdout, instead of text"
    )
    runner.set_defaults(run=_run)


def _add_shared(parser: argparse.ArgumentParser, address: str) -> None:
    parser.add_argument("address", help=address)
    parser.add_argument("--backend", choices=BACKENDS, help="the only way that may be used (all)")
    parser.add_argument("--protection", choices=("plain", "digest"), help="the least (by the way)")
    parser.add_argument("--insecure", action="store_true", help="as Config(insecure=True)")


def config_of(arguments: argparse.Namespace) -> Config:
    """Return the Config of a command line."""
    backends = None if arguments.backend is None else (arguments.backend,)
    return Config(backends=backends, protection=arguments.protection, insecure=arguments.insecure)


def size(text: str) -> int:
    """Return the bytes that "1048576", "512MiB" or "4 GiB" means. ValueError: none."""
    number = text.rstrip("KMGIBkmgib ")
    nbytes = int(number) * _UNITS.get(text[len(number) :].strip().upper(), 0)
    if nbytes < 1:
        raise ValueError(text)
    return nbytes


def positive(text: str) -> int:
    """Return the number. ValueError: it isn't one from 1 on."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _serve(arguments: argparse.Namespace) -> int:
    """0: the run of --once was brought to its end."""
    from kvtransport.cli.bench.serving import Server
    from kvtransport.endpoint import Endpoint

    try:
        with Endpoint(config_of(arguments)) as endpoint:
            print(f"serving at {endpoint.listen(arguments.address)}", flush=True)
            return 0 if Server(endpoint, arguments.memory_limit).serve(arguments.once) else 1
    except Exception as e:
        return _failed(e)


def _run(arguments: argparse.Namespace) -> int:
    """0: every byte was right; 1: it wasn't, or the run came to no end."""
    from kvtransport.cli.bench.cases import case_of
    from kvtransport.cli.bench.running import Plan, run
    from kvtransport.cli.bench.verbs import VERBS
    from kvtransport.endpoint import Endpoint

    try:
        if arguments.verb not in VERBS:
            raise ValueError(f"verb {arguments.verb!r} is unknown; the verbs are {', '.join(VERBS)}")
        case = case_of(arguments.case, arguments.scale)
        plan = Plan(case, arguments.scale, VERBS[arguments.verb], arguments.rounds)
        with Endpoint(config_of(arguments)) as endpoint:
            figures = run(endpoint, arguments.address, plan, arguments.timeout)
        _tell(figures.to_json(), str(figures), arguments.json)
    except Exception as e:
        return _failed(e)
    return 0


def _tell(told: dict[str, Any], text: str, file: str | None) -> None:
    if file == "-":
        print(json.dumps(told, indent=2))
        return
    print(text)
    if file is not None:
        Path(file).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _failed(error: Exception) -> int:
    """Tell what users can do something about in a line; anything else is a fault, with its trace."""
    from kvtransport.cli.bench.control import BenchError
    from kvtransport.errors import KVTransportError, WaitTimeout

    if not isinstance(
        error, BenchError | KVTransportError | WaitTimeout | OSError | ValueError | MemoryError
    ):
        raise error
    kind = "" if isinstance(error, BenchError) else f"{type(error).__name__}: "
    print(f"kvtransport bench: {kind}{error}", file=sys.stderr)
    return 1
