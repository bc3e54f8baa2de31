"""The command `kvtransport`, also `python -m kvtransport`: `doctor` and `bench`.

Here: choosing the subcommand. Each is a module with `add_arguments`, which is imported when the command runs:
`import kvtransport` imports none of this.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status. argv: without the program's name; None: the process's."""
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output, `head` for one, has had enough
        sys.stderr.close()
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    from kvtransport import __version__
    from kvtransport.cli import bench, doctor

    parser = argparse.ArgumentParser(prog="kvtransport", description="Tools of kvtransport.")
    parser.add_argument("--version", action="version", version=f"kvtransport {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor.add_arguments(commands.add_parser("doctor", help="what works on this machine, and why not"))
    bench.add_arguments(commands.add_parser("bench", help="measure moving blocks between two processes"))
    return parser
