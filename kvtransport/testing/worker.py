"""The process of a ProcessSide: one command a line of stdin, one answer a line of stdout, both JSON.

Here: the loop. Not here: the commands (`actor`). It ends at the end of its stdin.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from kvtransport.testing.actor import Actor, error_to_json


def main(actor: Actor) -> None:
    """Answer commands until there are no more."""
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"value": actor.do(asked["command"], asked["arguments"])}
        except Exception as error:
            answer = {"error": error_to_json(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Actor())
