"""An owner that reuses, rewrites and grants its blocks again as fast as it can, and a reader that reads them meanwhile.

The owner takes one set of blocks after the other: `reuse`, every word rewritten, a grant by a new token, and then it
says in a page of the bench's own which generation that was. Tokens are made of (set, generation), so the reader names
the generation that it asks for and knows what it must get. A token whose grant is already over is denied, or stale.

Invariant: every word of a piece is (layer, block, generation). So a piece that a read says is sealed is right, or stale
(whole, of another generation), or torn; and the destination is zero before each read, so nothing is right by what lay
there. Pieces that a failed read says are sealed are judged too.
"""

from __future__ import annotations

import base64
import collections
import mmap
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvtransport as kvt
from bench.arena import Arena
from bench.cases import PAGE, Case
from bench.rows import Row
from bench.special.context import Context

LAYERS, SETS, SET_BLOCKS = 4, 16, 32
DEPTH = 8  # reads in flight
LARGE_EVERY = 16  # a read of a whole set, 512 KiB, which movers copy; the others are of a block, 16 KiB
SHAPE = Case("rewriting", "rewritten", LAYERS, SETS * SET_BLOCKS, PAGE, 1, dst_blocks=DEPTH * SET_BLOCKS)
WAYS = {"shm": "mapped memory", "shm-plain": "process_vm_readv", "tcp": "TCP"}
WAIT_S = 30.0

Words = npt.NDArray[np.uint64]

_owner: _Owner | None = None


def bases() -> Words:
    """Return the word of generation 0 of each piece, [layer, block]; a generation is added to it."""
    layers, blocks = np.arange(1, LAYERS + 1), np.arange(SETS * SET_BLOCKS)
    return (layers[:, None] << 56 | blocks[None, :] << 40).astype(np.uint64)


def token_of(part: int, generation: int) -> str:
    """Return the token of a set's generation."""
    raw = part.to_bytes(4, "little") + generation.to_bytes(12, "little")
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def judge(words: Words, want: Words) -> tuple[int, int]:
    """Return how many of the pieces [layer, block, word] are stale, and how many are torn."""
    wrong = (words != want[..., None]).any(axis=2)
    if not wrong.any():
        return 0, 0
    whole = (words[wrong] == words[wrong][:, :1]).all(axis=1)
    return int(whole.sum()), int((~whole).sum())


class _Page:
    """The current generation of each set, in a file that both processes map."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self.generations: Words = np.frombuffer(self._memory, dtype=np.uint64)[:SETS]


class _Owner:
    """The thread that rewrites. `lawful`: it ends the grants before; one that doesn't must be found out."""

    def __init__(self, end: Any, page: str, lawful: bool) -> None:
        self._end = end
        self._page = _Page(page)
        self._lawful = lawful
        self._words = end.arena.tensors.view(np.uint64)
        self._bases = bases()
        self._stop = threading.Event()
        self.turns = 0
        self.error = ""
        for part in range(SETS):
            self._open(part, 1)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                part, generation = self.turns % SETS, self.turns // SETS + 2
                if self._lawful:
                    self._end.pool.reuse(self._ids(part))
                    self._open(part, generation)
                else:
                    self._rewrite(part, generation)
                self.turns += 1
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def _open(self, part: int, generation: int) -> None:
        self._rewrite(part, generation)
        # To this peer: whom a grant is for finds it without asking, so its reads meet the rewriting.
        self._end.pool.grant(
            self._ids(part),
            token=token_of(part, generation),
            to=self._end.conn.peer,
            readers=None,
            ttl_s=None,
        )
        self._page.generations[part] = generation

    def _rewrite(self, part: int, generation: int) -> None:
        rows = slice(part * SET_BLOCKS, (part + 1) * SET_BLOCKS)
        self._words[:, rows] = (self._bases[:, rows] + np.uint64(generation))[..., None]

    @staticmethod
    def _ids(part: int) -> Any:
        return np.arange(part * SET_BLOCKS, (part + 1) * SET_BLOCKS)


class _Reader:
    """Reads at random, DEPTH at a time, each into a place of its own."""

    def __init__(self, end: Any, page: str, seed: int) -> None:
        self._end = end
        self._page = _Page(page)
        self._words = end.arena.tensors.view(np.uint64)
        self._bases = bases()
        self._random = np.random.default_rng([seed, 30])
        self.seen: collections.Counter[str] = collections.Counter()

    def turn(self, reads: int) -> None:
        """Post `reads` reads, at most DEPTH, then judge one after the other."""
        parts = self._random.integers(0, SETS, DEPTH).tolist()
        places = self._random.integers(0, SET_BLOCKS, DEPTH).tolist()
        posted = []
        for i in range(reads):
            large = (self.seen["reads"] + i) % LARGE_EVERY == 0
            posted.append(self._post(i, parts[i], 0 if large else places[i], SET_BLOCKS if large else 1))
        for read in posted:
            self._judge(*read)
        self.seen["reads"] += reads

    def _post(self, slot: int, part: int, place: int, count: int) -> tuple[Any, int, int, Words]:
        into = slot * SET_BLOCKS
        self._words[:, into : into + count] = 0
        generation = int(self._page.generations[part])
        first = part * SET_BLOCKS + place
        want = self._bases[:, first : first + count] + np.uint64(generation)
        here, there = np.arange(into, into + count), np.arange(place, place + count)
        transfer = self._end.conn.read_blocks(token_of(part, generation), self._end.pool, here, subset=there)
        return transfer, into, count, want

    def _judge(self, transfer: Any, into: int, count: int, want: Words) -> None:
        words = self._words[:, into : into + count]
        try:
            result = transfer.result(timeout=WAIT_S)
        except kvt.StaleGrant as error:
            self.seen["stale grants"] += 1
            states = next(iter(error.blocks.values()), {})
            sealed = [i - into for i, state in states.items() if state == "sealed"]
            words, want = words[:, sealed], want[:, sealed]
        except kvt.PermissionDenied:
            self.seen["denied"] += 1
            return
        else:
            self.seen["sealed reads"] += 1
            self.seen[f"by {result.backend}"] += 1
        self.seen["pieces"] += words.shape[0] * words.shape[1]
        stale, torn = judge(words, want)
        self.seen["stale"] += stale
        self.seen["torn"] += torn


def worker_prepare(end: Any, mapped: bool) -> dict[str, Any]:
    """Worker: its case is not in the table of cases, so the arena is made here."""
    end.case = SHAPE
    end.arena = Arena(SHAPE, end.side, mapped)
    return {}


def worker_start(end: Any, page: str, lawful: bool) -> dict[str, Any]:
    """Worker, owner: begin."""
    global _owner
    _owner = _Owner(end, page, lawful)
    return {}


def worker_stop(end: Any) -> dict[str, Any]:
    """Worker, owner: end."""
    assert _owner is not None
    _owner.stop()
    return {"turns": _owner.turns, "error": _owner.error}


def worker_read(end: Any, page: str, seed: int, reads: int) -> dict[str, Any]:
    """Worker, reader: so many reads; what came of them."""
    reader = _Reader(end, page, seed)
    while reader.seen["reads"] < reads:
        reader.turn(min(DEPTH, reads - reader.seen["reads"]))
    return dict(reader.seen)


AT_ONCE = 20_000  # reads that one command makes, so that progress shows and no answer is awaited for long


def rewritten(context: Context, way: str, reads: int, lawful: bool = True) -> dict[str, int]:
    """Run an owner and a reader over a way; return the counts of what the reader saw, with the owner's turns."""
    seen: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="kvt-bench-") as folder, context.pair("c", way, False) as pair:
        page = Path(folder) / "page"
        page.write_bytes(bytes(mmap.PAGESIZE))
        for worker in (pair.src, pair.dst):
            worker.call("rewriting.prepare", mapped=pair.way.mapped)
        pair.open()
        pair.src.call("rewriting.start", page=str(page), lawful=lawful)
        for turn, first in enumerate(range(0, reads, AT_ONCE)):
            context.progress.step(f"an owner that rewrites, {way}: {first:,} of {reads:,} reads")
            count = min(AT_ONCE, reads - first)
            reply = pair.dst.call("rewriting.read", page=str(page), seed=turn, reads=count)
            seen.update({what: n for what, n in reply.items() if what != "ok"})
        stopped = pair.src.call("rewriting.stop")
    if stopped["error"]:
        raise RuntimeError(f"the owner failed: {stopped['error']}")
    seen["rewritten"] = stopped["turns"]
    return dict(seen)


def row_of(way: str, seen: dict[str, int]) -> Row:
    """Return a way's row. Not one sealed piece, or bytes that went another way: it says nothing."""
    wrong = seen.get("stale", 0) + seen.get("torn", 0)
    went = seen.get(f"by {way.split('-')[0]}", 0)
    if not went or went != seen.get("sealed reads"):
        return Row.failed(f"rewriting owner, {WAYS[way]}", f"{went} reads went by it: {seen}")
    shown = (
        f"{seen.get('stale', 0)} stale, {seen.get('torn', 0)} torn of {seen['pieces']:,} in {seen['reads']:,} reads ("
        f"{seen['sealed reads']:,} whole, {seen.get('stale grants', 0):,} StaleGrant, {seen.get('denied', 0):,} denied)"
    )
    return Row(f"rewriting owner, {WAYS[way]}: wrong pieces sealed", shown, "0", not wrong, broken=wrong > 0)


def measure_rows(context: Context) -> list[Row]:
    rows = []
    for way in WAYS:
        seen = rewritten(context, way, context.reads)
        context.details[f"rewriting {way}"] = seen
        rows.append(row_of(way, seen))
    return rows
