"""Three senders to one receiver against one of them alone, and two equal transfers posted at once.

The three are Endpoints of one process, with a connection each to the receiver's; the two go over one connection.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import measure
from bench.cases import Case, Ids, Side, case_of
from bench.process import WorkerError
from bench.rows import Row
from bench.special.context import Context, titled
from bench.special.mesh import Mesh, links, star

SENDERS, SUM_LEAST = 3, 0.85
APART_MOST = 1.2
BLOCKS = 256
CASE: Case = case_of("h")  # whose destination has room for all of them
NBYTES = BLOCKS * CASE.tensors * CASE.block_nbytes
WAIT_S = 60.0
SETTLE_S = 0.05


def ids_of_part(seed: int, part: int, side: Side) -> Ids:
    """Return the ids of one of the transfers at once; those of the destination lie apart."""
    rng = np.random.default_rng([seed, part, 20 if side == "src" else 21])
    first, among = (part * BLOCKS, BLOCKS) if side == "dst" else (0, CASE.blocks)
    return rng.permutation(among)[:BLOCKS].astype(np.int64) + first


def _post(side: Side, seed: int, over: list[int]) -> list[Any]:
    """Post a transfer on each of the connections `over`."""
    transfers = []
    for part, link in enumerate(over):
        node, conn = links[link]
        call = conn.send_blocks if side == "src" else conn.recv_blocks
        transfers.append(call(node.pool, ids_of_part(seed, part, side), key=f"part-{seed}-{part}"))
    return transfers


def worker_receive(end: Any, seed: int, over: list[int]) -> Iterator[dict[str, Any]]:
    """Worker, destination: post, say so, wait, check every byte."""
    end.arena.wipe()
    transfers = _post("dst", seed, over)
    yield {}
    for transfer in transfers:
        transfer.result(timeout=WAIT_S)
    parts = range(len(over))
    source = np.concatenate([ids_of_part(seed, part, "src") for part in parts])
    here = np.concatenate([ids_of_part(seed, part, "dst") for part in parts])
    yield {"wrong": end.arena.wrong_blocks(source, here)}


def worker_send(end: Any, seed: int, over: list[int]) -> dict[str, Any]:
    """Worker, source: post all at once; the time of each, and of all."""
    began = time.perf_counter()
    results = [transfer.result(timeout=WAIT_S) for transfer in _post("src", seed, over)]
    return {"seconds": time.perf_counter() - began, "each_s": [result.seconds for result in results]}


def _moved(pair: Any, seed: int, over: list[int]) -> dict[str, Any]:
    pair.dst.call("sharing.receive", seed=seed, over=over)
    time.sleep(SETTLE_S)
    sent: dict[str, Any] = pair.src.call("sharing.send", seed=seed, over=over)
    if wrong := pair.dst.read_reply()["wrong"]:
        raise WorkerError(f"{wrong} blocks hold wrong bytes")
    return sent


def measure_rows(context: Context, backend: str = "tcp") -> list[Row]:
    sums, apart = [], []
    with context.pair("h", backend, open_now=False) as pair:
        group = Mesh(pair, star(SENDERS))
        group.grow(SENDERS)
        every = list(range(SENDERS))
        _moved(pair, 0, every)  # opens the windows
        for turn in range(context.rounds):
            context.progress.step(f"three senders, two transfers: round {turn + 1}/{context.rounds}")
            seed = 3 * turn + 1
            one = NBYTES / _moved(pair, seed, [turn % SENDERS])["seconds"]
            three = SENDERS * NBYTES / _moved(pair, seed + 1, every)["seconds"]
            two = _moved(pair, seed + 2, [turn % SENDERS] * 2)["each_s"]
            sums.append(three / one)
            apart.append(max(two) / min(two))
        group.close()
    context.details[titled("sharing", backend)] = {"three_over_one": sums, "two_apart": apart}
    three = titled("three senders to one receiver / one alone", backend)
    two = titled("two equal transfers at once: last / first", backend)
    return [
        Row.at_least(three, measure.median(sums), SUM_LEAST),
        Row.at_most(two, measure.median(apart), APART_MOST),
    ]


def measure_shm(context: Context) -> list[Row]:
    return measure_rows(context, "shm")
