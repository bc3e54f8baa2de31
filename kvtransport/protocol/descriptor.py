"""The descriptor of an Endpoint: a short printable string that a peer's `connect` takes.

Here: its form. Not here: who makes the addresses (`kvtransport.endpoint`), and what they mean
(`kvtransport.backends`).

    kvt1:<incarnation, 32 hex digits>@<address>,<address>...

A comma, percent sign, white space or control character of an address is percent-encoded. A reader refuses
other versions.

Invariant: `parse_descriptor(str(d)) == d`; whatever the text is, parsing gives a Descriptor or ValueError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

VERSION: Final = 1
MAX_CHARS: Final = 8_192
MAX_ADDRESSES: Final = 16

_FORM = re.compile(r"kvt(\d{1,4}):([0-9a-f]{32})@([!-~]*)", re.ASCII)
_KEPT = "/:[]@._-~!$&'()*+;="


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where an Endpoint can be reached, and which one it is."""

    incarnation: bytes
    addresses: tuple[str, ...]

    def __str__(self) -> str:
        places = ",".join(quote(address, safe=_KEPT) for address in self.addresses)
        return f"kvt{VERSION}:{self.incarnation.hex()}@{places}"


def is_descriptor(where: str) -> bool:
    """Say whether it is meant to be one: no address begins like that."""
    return re.match(r"kvt\d+:", where, re.ASCII) is not None


def demand_fits(descriptor: Descriptor) -> None:
    """Raise ValueError where it is longer than its readers take; then its addresses fit a HELLO, too."""
    if (nchars := len(str(descriptor))) > MAX_CHARS:
        raise ValueError(
            f"all addresses of an endpoint together: a descriptor of {nchars} characters, not {MAX_CHARS}"
        )


def parse_descriptor(text: str) -> Descriptor:
    """Parse what `str(descriptor)` gave."""
    form = _FORM.fullmatch(text) if len(text) <= MAX_CHARS else None
    if form is None:
        raise ValueError("malformed descriptor: it must look like kvt1:<32 hex digits>@<addresses>")
    version, incarnation, places = form.groups()
    if int(version) != VERSION:
        raise ValueError(f"descriptor of version {version}; this library reads version {VERSION}")
    addresses = tuple(unquote(place, errors="strict") for place in places.split(",") if place)
    if len(addresses) > MAX_ADDRESSES:
        raise ValueError(f"descriptor with {len(addresses)} addresses, of at most {MAX_ADDRESSES}")
    return Descriptor(bytes.fromhex(incarnation), addresses)
