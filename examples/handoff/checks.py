"""What the demo claims, as functions that raise CheckFailed where it isn't so.

Pure: tensors and digests in, nothing moved, nothing printed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from handoff.model import Generation

Digests = list[list[str]]  # of one request: [layer][position of the block]


class CheckFailed(Exception):
    """A claim of the demo does not hold; the message says which and where."""


def block_digests(tensors: Sequence[torch.Tensor], block_ids: Sequence[int]) -> Digests:
    """A digest of every byte of each block, the unfilled slots of the last one included."""

    def digest(block: torch.Tensor) -> str:
        return hashlib.blake2b(_bytes(block).numpy(), digest_size=16).hexdigest()

    return [[digest(blocks[block]) for block in block_ids] for blocks in tensors]


def check_blocks(received: Mapping[str, Digests], sent: Mapping[str, Digests]) -> int:
    """Every block of every layer holds the bytes that were sent; returns how many pieces were compared."""
    if received.keys() != sent.keys():
        raise CheckFailed(f"requests differ: received {sorted(received)}, sent {sorted(sent)}")
    compared = 0
    for key, layers in sent.items():
        if [len(layer) for layer in received[key]] != [len(layer) for layer in layers]:
            raise CheckFailed(f"{key}: these are not as many layers and blocks as were sent")
        for layer, blocks in enumerate(layers):
            for position, digest in enumerate(blocks):
                if received[key][layer][position] != digest:
                    raise CheckFailed(f"{key}: bytes differ in layer {layer}, its block number {position}")
                compared += 1
    return compared


def check_equal(got: Generation, want: Generation) -> None:
    """The same tokens from bit-equal logits, for every request."""
    rows = differing_rows(got, want)
    if rows:
        raise CheckFailed(f"logits differ from the run without hand-off for requests {rows}")
    if not torch.equal(got.tokens, want.tokens):
        raise CheckFailed("logits are equal, tokens are not")


def check_differs(control: str, got: Generation, want: Generation, rows: Sequence[int]) -> int:
    """A damaged cache shows: exactly these requests differ. Returns how many tokens changed.

    Without this the other checks might pass because nothing that they look at depends on the moved bytes.
    """
    found = differing_rows(got, want)
    if found != sorted(rows):
        raise CheckFailed(f"control '{control}': requests {sorted(rows)} should differ, {found} do")
    return int((got.tokens != want.tokens).sum())


def differing_rows(got: Generation, want: Generation) -> list[int]:
    """Requests whose logits are not equal bit by bit (so NaN equals NaN, and 0.0 is not -0.0)."""
    if got.logits.shape != want.logits.shape or got.logits.dtype != want.logits.dtype:
        raise CheckFailed(f"logits of another form: {tuple(got.logits.shape)} {got.logits.dtype}")
    same = (_bytes(got.logits) == _bytes(want.logits)).flatten(start_dim=1).all(dim=1)
    return [row for row, equal in enumerate(same.tolist()) if not equal]


def same_bytes(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(one, other, strict=True))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
