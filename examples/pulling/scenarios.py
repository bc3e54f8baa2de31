"""What the router does: it sends requests to a prefill and a decode engine, and hears what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import kvtransport as kvt
from pulling.engine import JSON, Engine
from pulling.memory import TOKENS

# What the router says to P(refill) and D(ecode), and what it must hear, of a request with so many blocks of full
# attention; "/2" is a second request with the same prompt, four blocks longer.
SCENARIOS = {
    "all blocks": (8, "D.load P.run P=computed D=loaded P=read D.abort D=freed"),
    "prefix hit": (
        8,
        "P.run P=computed D.load D=loaded P=read P.run/2 P=computed/2 D.load/2 D=loaded/2 P=read/2 "
        "D.abort/2 D=freed/2 D.abort D=freed",
    ),
    "abort when done": (8, "P.run P=computed D.load D=loaded P=read D.abort D=freed"),
    "abort before the grant": (
        8,
        "D.queue D.load D.abort D=aborted D.settle D=settled P.run_short P=computed P=expired",
    ),
    "abort while queued": (8, "P.run P=computed D.abort D=aborted P=read"),
    "abort while queued, held": (8, "D.queue P.run P=computed D.abort D=aborted P=read"),
    "abort in flight": (280, "P.run P=computed D.load_and_abort D=aborted P=read"),
    "abort in flight, held": (280, "D.queue P.run P=computed D.load_and_abort D=aborted P=read"),
    "revoked by prefill": (
        8,
        "D.queue P.run P=computed D.settle D=settled P.revoke P=revoked D=StaleGrant "
        "D.load D=computed D.abort D=freed",
    ),
    "expiry while queued": (
        8,
        "P.run_short P=computed P=expired D.load D=PermissionDenied D=computed D.abort D=freed",
    ),
    "expiry while queued, held": (
        8,
        "D.queue P.run_short P=computed D.settle D=settled P.run_short/2 P=computed/2 P=expired/2 "
        "D.load D=loaded P=read D.abort D=freed",
    ),
    "prefill fails": (8, "D.load P.fail D=PeerAborted D=computed D.abort D=freed"),
    "prefill fails, held": (8, "D.queue P.fail D=PermissionDenied D.load D=computed D.abort D=freed"),
}
WINDOW = 2  # blocks of sliding window attention
TRIES = 20  # of an abort that came too late: what it was to cut short had landed


class Failed(Exception):
    """Something came out other than it must."""


class Router:
    """A prefill and a decode engine, of so many ranks each."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self._engines = engines
        self._prompts = 0
        self.nbytes = 0
        self.backends: set[str] = set()

    def play(self, name: str) -> str:
        """One scenario: what was heard. Failed where it comes out otherwise."""
        full, script = SCENARIOS[name]
        for _ in range(TRIES):
            self.nbytes = 0
            self._prompts += 1
            requests = {key: self._request(name, full + more) for key, more in (("", 0), ("2", 4))}
            heard = [self._step(step, requests) for step in script.split()]
            if not any("too late" in what for what in heard):
                return ", ".join(filter(None, heard))
        raise Failed(f"{TRIES} aborts came too late")

    def _request(self, name: str, full: int) -> JSON:
        return {
            "id": f"{name} {self._prompts} {full}",
            "prompt": self._prompts,
            "token": kvt.new_token(),
            "prefilled": False,
            "tokens": full * TOKENS,
            "full": full,
            "window": WINDOW,
            "prefill": self._engines["P"].addresses,
            "decode": self._engines["D"].addresses,
        }

    def _step(self, step: str, requests: dict[str, JSON]) -> str:
        """Say it, or hear it: what was heard."""
        words, _, which = step.partition("/")
        side, request = words[0], requests[which]
        if words[1] == ".":
            self._engines[side].tell(words[2:], request)
            return ""
        heard = self._outcome(self._engines[side], request)
        if heard not in (words[2:], "too late"):
            raise Failed(f"{side} says {heard}, where {step} was to come")
        request["prefilled"] |= step.startswith("P=computed")
        return f"{side} {heard}"

    def _outcome(self, engine: Engine, request: JSON) -> str:
        while True:
            event: JSON = engine.hear()
            if event.get("wrong"):
                raise Failed(f"{event['id']}: {event['wrong']} words are wrong after {event['of']}")
            self.nbytes += event.get("nbytes", 0)
            self.backends |= set(event.get("backends", ()))
            if event["outcome"]:
                return (
                    str(event["outcome"]) if event["id"] == request["id"] else f"{event}, of another request"
                )


def run(
    connector: tuple[Callable[[], Any], Callable[..., Any]],
    backends: tuple[str, ...] | None,
    names: Iterable[str] = tuple(SCENARIOS),
) -> int:
    """The scenarios, from one prefill rank to two of decode, and from two to one."""
    failures = 0
    for ranks in ((1, 2), (2, 1)):
        engines = {side: Engine(count, connector, backends) for side, count in zip("PD", ranks, strict=True)}
        router = Router(engines)
        before = failures
        for name in names:
            try:
                said = f"ok: {router.play(name)}"
            except (Failed, OSError, EOFError) as failure:
                said = f"FAILED: {failure!r}"
                failures += 1
            print(f"{ranks[0]} to {ranks[1]}  {name:<25} {router.nbytes / 1e6:4.1f} MB  {said}", flush=True)
            if failures > before:
                break  # nobody knows what state the engines are in
        codes = [code for engine in engines.values() for code in engine.close()]
        print(f"over {', '.join(sorted(router.backends))}; exit codes {codes}", flush=True)
        failures += sum(code != 0 for code in codes)
    print("FAILED" if failures else "every byte was checked, and is right")
    return 1 if failures else 0
