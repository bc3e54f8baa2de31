"""The row of the owner that rewrites: what it must see, and that it sees it."""

from __future__ import annotations

import numpy as np
import pytest

import kvtransport as kvt
from bench.progress import Progress
from bench.special import rewriting
from bench.special.context import Context

READS = 400


def context() -> Context:
    return Context({}, 1, Progress(1, quiet=True))


def piece_words(generation: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two blocks' words [layer, block, word] and what is to be read of them."""
    want = rewriting.bases()[:, 5:7] + np.uint64(generation)
    return np.repeat(want[..., None], 512, axis=2), want


def test_every_piece_and_generation_has_words_of_its_own() -> None:
    bases = rewriting.bases().ravel()
    assert len(set(bases.tolist())) == len(bases)
    assert bases.min() > 0
    assert not (bases & np.uint64((1 << 40) - 1)).any()


def test_a_token_is_one_and_names_set_and_generation() -> None:
    tokens = {rewriting.token_of(part, generation) for part in range(3) for generation in range(3)}
    assert len(tokens) == 9
    assert {len(token) for token in tokens} == {len(kvt.new_token())}


def test_right_stale_and_torn_pieces_are_told_apart() -> None:
    words, want = piece_words(3)
    assert rewriting.judge(words, want) == (0, 0)
    words[1, 0] += np.uint64(1)
    assert rewriting.judge(words, want) == (1, 0)
    words[2, 1, 511] -= np.uint64(1)
    assert rewriting.judge(words, want) == (1, 1)
    assert rewriting.judge(np.zeros_like(words), want) == (words.shape[0] * words.shape[1], 0)


@pytest.mark.parametrize("way", list(rewriting.WAYS))
def test_no_wrong_piece_is_sealed(way: str) -> None:
    seen = rewriting.rewritten(context(), way, READS)
    row = rewriting.row_of(way, seen)
    assert row.met, row.measured
    assert seen["reads"] == READS
    assert seen["sealed reads"] + seen.get("stale grants", 0) + seen.get("denied", 0) == READS


@pytest.mark.parametrize("way", list(rewriting.WAYS))
def test_an_owner_that_does_not_end_its_grants_is_found_out(way: str) -> None:
    row = rewriting.row_of(way, rewriting.rewritten(context(), way, READS, lawful=False))
    assert row.broken
    assert not row.met


def test_reads_that_went_another_way_are_no_result() -> None:
    seen = {"reads": 9, "pieces": 36, "sealed reads": 9, "by tcp": 9}
    assert rewriting.row_of("tcp", seen).met
    assert rewriting.row_of("shm", seen).broken
    assert rewriting.row_of("tcp", {"reads": 9, "pieces": 0, "denied": 9}).broken
