"""Two endpoints of this process over each way that there is, kept for many examples; and layouts as numpy sees
them.

The reference is numpy's own indexing: [block, head, token, dim] views of what was registered, one for each part
(K, V) of each layer. It knows nothing of runs or of the library's arithmetic.
"""

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

import kvtransport as kvt
from tests.waiting import until

LIMIT_S = 20
KEPT = 24  # pairs at once: each has threads and descriptors


@dataclass(frozen=True)
class Link:
    """How two endpoints are connected."""

    way: str = "tcp"  # tcp | unix | inproc | shm
    protection: str = "plain"
    lanes: int | None = None
    chunk_nbytes: int | None = None

    def __str__(self) -> str:
        return f"{self.way} {self.protection}"


LINKS = [Link(way, protection) for way in ("tcp", "unix", "inproc") for protection in ("plain", "digest")]


def sized(link: Link, lanes: list[int], chunks: list[int]) -> st.SearchStrategy[Link]:
    """The same way and protection, with any of these; inproc has no lanes and one size of chunk."""
    if link.way == "inproc":
        return st.just(link)
    return st.builds(
        Link,
        st.just(link.way),
        st.just(link.protection),
        st.sampled_from(lanes),
        st.sampled_from(chunks),
    )


@dataclass
class Pair:
    ours: kvt.Endpoint
    theirs: kvt.Endpoint
    out: kvt.Connection
    back: kvt.Connection

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


class Pairs:
    """Connected endpoints by their Link: made once, and again when it was closed for others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # of the unix sockets
        self._numbers = itertools.count()
        self._made: OrderedDict[Link, Pair] = OrderedDict()

    def __call__(self, link: Link = Link()) -> Pair:
        if link not in self._made:
            if len(self._made) >= KEPT:
                self._made.popitem(last=False)[1].close()
            self._made[link] = self._connect(link)
        self._made.move_to_end(link)
        return self._made[link]

    def _connect(self, link: Link) -> Pair:
        backend = link.way if link.way in ("inproc", "shm") else "tcp"
        config = kvt.Config(
            backends=("shm", "tcp") if backend == "shm" else (backend,),
            protection=link.protection,
            lanes=link.lanes,
            chunk_nbytes=link.chunk_nbytes,
            movers=2,
        )
        ours, theirs = kvt.Endpoint(config), kvt.Endpoint(config)
        where = {"inproc": None, "unix": f"unix:{self._folder}/{next(self._numbers)}"}.get(
            link.way, "127.0.0.1:0"
        )
        at = theirs.listen(where) if where else f"inproc:{theirs.incarnation.hex()}"
        out = ours.connect(at, timeout=LIMIT_S)
        until(lambda: out.backend == backend)  # shared memory comes up after the session
        assert f"protection {link.protection}" in out.explain()
        return Pair(ours, theirs, out, theirs.accept(LIMIT_S))

    def close(self) -> None:
        while self._made:
            self._made.popitem()[1].close()


@dataclass(frozen=True)
class Form:
    """A side's layout and how its tensors lie in memory."""

    kv: str  # packed | single | pair | axis0 | axis1
    order: str
    tokens: int
    heads: int
    dim: int
    v_dim: int
    dtype: str
    blocks: int
    pad: int  # elements between neighbouring blocks

    def layout(self) -> kvt.BlockLayout:
        kv = self.kv if self.kv in ("packed", "single") else "split"
        return kvt.BlockLayout(
            tokens_per_block=self.tokens,
            num_kv_heads=self.heads,
            head_dim=self.dim,
            dtype=self.dtype,
            order=self.order,
            kv=kv,
            kv_axis={"axis0": 0, "axis1": 1}.get(self.kv),
            v_head_dim=self.v_dim if self.kv in ("packed", "pair") else None,
        )

    def _array(self, lead: tuple[int, ...], dim: int, fill: np.random.Generator) -> np.ndarray:
        """[*lead, inner..., dim] whose blocks lie `pad` elements apart."""
        inner = (self.heads, self.tokens, dim) if self.order == "HND" else (self.tokens, self.heads, dim)
        size = int(np.prod(inner))
        outer = int(np.prod(lead))
        raw = np.frombuffer(
            fill.bytes(outer * (size + self.pad) * np.dtype(self.dtype).itemsize), self.dtype
        ).copy()
        rows = raw.reshape(outer, size + self.pad)[:, :size]
        strides = [rows.itemsize]
        for n in inner[:0:-1]:
            strides.append(strides[-1] * n)
        outside = [rows.strides[0]]
        for n in lead[:0:-1]:
            outside.append(outside[-1] * n)
        return np.lib.stride_tricks.as_strided(rows, (*lead, *inner), (*outside[::-1], *strides[::-1]))

    def tensors(self, layers: int, seed: int) -> tuple[list, list[list[np.ndarray]], list[np.ndarray]]:
        """(what is registered, its parts as [block, head, token, dim] per layer, the bare memory)."""
        fill = np.random.default_rng(seed)
        given, parts, bare = [], [], []
        for _ in range(layers):
            if self.kv == "pair":
                both = [self._array((self.blocks,), d, fill) for d in (self.dim, self.v_dim)]
                given.append(tuple(both))
                views = both
            else:
                lead = {"axis0": (2, self.blocks), "axis1": (self.blocks, 2)}.get(self.kv, (self.blocks,))
                dim = self.dim + self.v_dim if self.kv == "packed" else self.dim
                both = [self._array(lead, dim, fill)]
                given.append(both[0])
                views = both
                if self.kv == "axis0":
                    views = [both[0][0], both[0][1]]
                elif self.kv == "axis1":
                    views = [both[0][:, 0], both[0][:, 1]]
            parts.append([v if self.order == "HND" else v.swapaxes(1, 2) for v in views])
            bare += [root(a) for a in both]
        return given, parts, bare


def root(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
