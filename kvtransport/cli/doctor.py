"""`kvtransport doctor`: the command. Here: its arguments, what it prints, its exit status."""

from __future__ import annotations

import argparse
import json

from kvtransport.cli.peer import CONNECT_S, lines, try_ways
from kvtransport.cli.report import examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--peer", metavar="ADDRESS", help="also try every way to the endpoint that listens there"
    )
    parser.add_argument(
        "--timeout", type=float, default=CONNECT_S, help="of each try, in seconds (%(default)s)"
    )
    parser.add_argument("--insecure", action="store_true", help="with --peer: as Config(insecure=True)")
    parser.add_argument(
        "--no-message",
        action="store_true",
        help="with --peer: don't send it the messages that measure the round trip",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report. 0: TCP works, and the peer was reached by some way; else 1."""
    report = examine()
    told = report.to_json()
    text = [str(report)]
    works = report.works
    if arguments.peer is not None:
        ways = try_ways(
            arguments.peer,
            insecure=arguments.insecure,
            sends=not arguments.no_message,
            timeout=arguments.timeout,
        )
        told["peer"] = {
            "address": arguments.peer,
            "ways": {name: way.to_json() for name, way in ways.items()},
        }
        text += ["", *lines(arguments.peer, ways)]
        works = works and any(way.reached for way in ways.values())
    print(json.dumps(told, indent=2) if arguments.json else "\n".join(text))
    return 0 if works else 1
