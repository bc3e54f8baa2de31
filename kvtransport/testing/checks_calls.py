"""Checks of the calls around transfers: meta, messages, misuse, queues, event loops; and that nothing is left."""

from __future__ import annotations

import asyncio
import gc
import select
import weakref
from typing import Any, Final

from kvtransport.errors import (
    KVTransportError,
    LayoutMismatch,
    LocalProtocolError,
    PeerAborted,
    TransferCancelled,
)
from kvtransport.testing.actor import LIMIT_S
from kvtransport.testing.blocks import Blocks
from kvtransport.testing.check import check, raises, same, true
from kvtransport.testing.checks_gates import HERE, LAYERS, OF, THERE, TO, gated, let_go
from kvtransport.testing.harness import Harness, Rig
from kvtransport.testing.side import ProcessSide, Side

META_NBYTES: Final = 4096
MESSAGE_NBYTES: Final = 1 << 20


@check()
def meta_both_ways(harness: Harness) -> None:
    """Each side's result has the other's meta, of 0 to 4,096 bytes; more is refused at the call."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", OF)
            destination.pool("to", TO)
            for ours, theirs in ((b"", b"\0"), (bytes(range(256)) * 16, b""), (b"a", b"b" * META_NBYTES)):
                source.send("t", "of", THERE, meta=ours)
                destination.recv("t", "to", HERE, meta=theirs)
                same(destination.result("t")["meta"], ours.hex(), "meta at the destination")
                same(source.result("t")["meta"], theirs.hex(), "meta at the source")
            _refused(source, "of", meta=bytes(META_NBYTES + 1))
            let_go(source, destination)


def _refused(source: Side, pool: str, **options: Any) -> None:
    raises(ValueError, lambda: source.send("no", pool, [0], **options))


@check()
def keys(harness: Harness) -> None:
    """1 to 255 bytes; one unfinished transfer a direction; free again when it is over."""
    with harness.rig() as rig:
        rig.here.pool("of", OF)
        rig.peer.pool("to", TO)
        for key in ("", "k" * 256):
            _refused(rig.here, "of", key=key)
        for key in ("k", "k" * 255, "\u00e9\0\n"):
            rig.here.send("t", "of", THERE, key=key)
            raises(LocalProtocolError, lambda: rig.here.send("twice", "of", [0], key=key))  # noqa: B023
            rig.here.recv("back", "of", [1], key=key)
            rig.here.cancel("back")
            same(type(rig.here.error("back")), TransferCancelled, "error")
            rig.peer.recv("t", "to", HERE, key=key)
            rig.here.result("t")
            rig.peer.result("t")
        rig.peer.holds("to", TO.after(OF, HERE, THERE))


@check()
def misuse_is_an_error_at_the_call(harness: Harness) -> None:
    """Ids out of range or of another kind, closed pools; the connection goes on."""
    with harness.rig() as rig:
        here = rig.here
        here.pool("of", OF)
        for ids in ([OF.count], [-1], [0, 1 << 40]):
            raises(ValueError, lambda: here.send("no", "of", ids))  # noqa: B023
            raises(ValueError, lambda: here.recv("no", "of", ids))  # noqa: B023
        connection, pool = here.actor.connection, here.actor.pools["of"]
        raises(TypeError, lambda: connection.send_blocks("of", [0], key="k"))  # type: ignore[arg-type]
        raises(ValueError, lambda: here.send("no", "of", [0], layers=[LAYERS]))
        here.call("close_pool", name="of")
        raises(LocalProtocolError, lambda: connection.send_blocks(pool, [0], key="k"))
        rig.peer.pool("to", TO)
        here.pool("of", OF)
        here.send("t", "of", THERE)
        rig.peer.recv("t", "to", HERE)
        here.result("t")
        rig.peer.holds("to", TO.after(OF, HERE, THERE))


@check()
def overlaps_are_refused(harness: Harness) -> None:
    """Within a call by ValueError, with a receive in flight by LocalProtocolError that names its key."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", OF)
            destination.pool("to", TO)
            _overlap(source, destination)
            let_go(source, destination)


def _overlap(source: Side, destination: Side) -> None:
    raises(ValueError, lambda: destination.recv("no", "to", [3, 4, 3]))
    destination.recv("first", "to", [3, 4])
    error = raises(LocalProtocolError, lambda: destination.recv("no", "to", [5, 4]))
    true("first" in str(error), f"the key isn't named: {error}")
    destination.recv("second", "to", [5])
    source.send("first", "of", [0, 0])
    source.send("second", "of", [0])
    destination.results(["first", "second"])
    destination.recv("third", "to", [5, 4])
    destination.cancel("third")
    same(type(destination.error("third")), TransferCancelled, "error")
    destination.holds("to", TO.after(OF, [3, 4, 5], [0, 0, 0]))


@check()
def other_sizes_are_a_mismatch(harness: Harness) -> None:
    """Another number of blocks, layers or bytes: LayoutMismatch on both sides, before any byte."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", OF)
            destination.pool("to", TO)
            destination.pool("odd", Blocks(12, OF.nbytes + 1, layers=LAYERS))
            posts: tuple[tuple[str, list[int], dict[str, Any]], ...] = (
                ("to", [1], {}),
                ("to", [1, 2], {"layers": [0]}),
                ("odd", [1, 2], {}),
            )
            for pool, ids, options in posts:
                source.send("t", "of", [0, 1])
                destination.recv("t", pool, ids, **options)
                errors = (source.error("t"), destination.error("t"))
                same(tuple(map(type, errors)), (LayoutMismatch, LayoutMismatch), f"errors {errors!r}")
            destination.holds("to", TO.memory())
            destination.call("close_pool", name="odd")
            let_go(source, destination)


@check()
def messages_in_order(harness: Harness) -> None:
    """Of 0 bytes to 1 MiB, hundreds, both ways at once; larger ones are refused."""
    sent = [b"", b"a", bytes(MESSAGE_NBYTES), *(str(n).encode() for n in range(300)), b"z" * 70_000]
    with harness.rig() as rig:
        for side in (rig.here, rig.peer):
            for n, data in enumerate(sent):
                side.message(f"m{n}", data)
        for side in (rig.peer, rig.here):
            true(side.messages(len(sent)) == sent, "messages came otherwise than they were sent")
            side.results(f"m{n}" for n in range(len(sent)))
        raises(ValueError, lambda: rig.here.message("long", bytes(MESSAGE_NBYTES + 1)))


@check()
def messages_after_a_transfer(harness: Harness) -> None:
    """Sent once it has succeeded; with its error, and not at all, where it fails."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            gated(source, destination)
            source.message("m", b"after", after="t")
            source.message("other", b"before")
            same(destination.messages(1), [b"before"], "messages")
            true(not source.done("m"), "the message is done before its transfer")
            source.call("word", name="g", value=LAYERS)
            same(destination.messages(1), [b"after"], "messages")
            destination.holds("to", TO.after(OF, HERE, THERE))  # the blocks were there before it
            destination.result("t")
            same(source.error("m"), None, "error")
            source.message("late", b"late", after="t")
            same(destination.messages(1), [b"late"], "messages")
            let_go(source, destination)
            gated(source, destination)
            source.message("m", b"never", after="t")
            destination.cancel("t")
            same(type(source.error("m")), PeerAborted, "the message's error")
            source.message("last", b"last")
            same(destination.messages(1), [b"last"], "messages")
            let_go(source, destination)


@check()
def queues(harness: Harness) -> None:
    """Each handle comes out once, with its tag, whatever its end; the descriptor says when."""
    of, to = Blocks(40, 1000), Blocks(40, 1000, seed=2)
    with harness.rig() as rig:
        rig.here.pool("of", of)
        rig.peer.pool("to", to)
        connection, pool = rig.here.actor.connection, rig.here.actor.pools["of"]
        queue = rig.here.actor.endpoint.completion_queue()
        same(queue.poll(), [], "a new queue")
        posted: dict[int, Any] = {}
        for n in range(40):
            posted[n] = connection.send_blocks(pool, [n], key=str(n), queue=queue, tag=n)
        posted[40] = connection.send_message(b"m", queue=queue, tag=40)
        for n in range(0, 40, 4):
            posted[n].cancel()
        for n in range(40):
            if n % 4:
                rig.peer.recv(str(n), "to", [n])
        ended: dict[object, Any] = {}
        while len(ended) < len(posted):
            true(select.select([queue], [], [], LIMIT_S)[0], f"{len(ended)} of {len(posted)} came")
            for handle in queue.poll():
                true(handle.done() and handle.tag not in ended, f"{handle!r} isn't done, or came twice")
                ended[handle.tag] = handle
        same((queue.poll(), len(queue)), ([], 0), "the queue afterwards")
        for n, handle in posted.items():
            true(ended[n] is handle, f"handle {n} is another one")
            error = handle.exception()
            same(type(error), TransferCancelled if n < 40 and n % 4 == 0 else type(None), f"error of {n}")
        rig.peer.results(str(n) for n in range(40) if n % 4)


@check()
def await_and_cancelled_tasks(harness: Harness) -> None:
    """`await` returns the result or raises the error; a cancelled task's transfer is over when the await ends."""
    with harness.rig() as rig:
        asyncio.run(asyncio.wait_for(_await(rig), LIMIT_S))


async def _await(rig: Rig) -> None:
    here, peer = rig.here, rig.peer
    here.pool("of", OF)
    peer.pool("to", TO)
    here.send("t", "of", THERE)
    task = asyncio.ensure_future(_of(here, "t"))
    await asyncio.sleep(0)
    peer.recv("t", "to", HERE)
    same((await task).nbytes, OF.nbytes * LAYERS * len(HERE), "nbytes")
    same((await _of(here, "t")).nbytes, OF.nbytes * LAYERS * len(HERE), "nbytes, again")
    here.gate("g", LAYERS)
    here.send("t", "of", THERE, gate="g")
    peer.recv("t", "to", HERE)
    here.matched("t")
    tasks = [asyncio.ensure_future(_of(here, "t")) for _ in range(2)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    same([type(end) for end in ends], [asyncio.CancelledError, TransferCancelled], "ends")
    true(here.done("t"), "the await ended before the transfer")
    same(type(peer.error("t")), PeerAborted, "the peer's error")


async def _of(side: Any, handle: str) -> Any:
    return await side.actor.handles[handle]


@check()
def nothing_is_left_behind(harness: Harness) -> None:
    """Descriptors, threads, pools and arrays: as many after endpoints have come and gone, with whatever end."""
    before: dict[str, dict[str, int]] = {}
    for _ in range(5):
        with harness.rig() as rig:
            _use(rig)
            dropped = weakref.ref(rig.here.actor.memory["of"][0])
            for side, pool in ((rig.here, "of"), (rig.peer, "to")):
                same(side.call("stats"), {"connections": 1, "pools": 1}, f"{side.name}: what it has")
                side.call("close_pool", name=pool)
                same(side.call("stats")["pools"], 0, f"{side.name}: pools")
            rig.here.actor.handles.clear()
            gc.collect()
            true(dropped() is None, "a closed pool keeps its arrays")
            sides: list[Side] = [rig.here, rig.peer]
        for side in sides:
            if isinstance(side, ProcessSide) and not side.alive:
                raise AssertionError("the peer's process has ended")
            counts = side.call("counts")
            first = before.setdefault(side.name, counts)
            # One more is the thread's own eventfd, made when it first has to sleep.
            true(
                counts["descriptors"] <= first["descriptors"] + 1 and counts["threads"] <= first["threads"],
                f"{side.name}: it has {counts}, after the first round it had {first}",
            )


def _use(rig: Rig) -> None:
    rig.here.pool("of", OF)
    rig.peer.pool("to", TO)
    rig.here.gate("g", LAYERS)
    for n, end in enumerate(("result", "cancel", "result")):
        rig.here.send(f"{n}", "of", THERE, gate="g" if end == "cancel" else None)
        rig.peer.recv(f"{n}", "to", HERE)
        if end == "cancel":
            rig.peer.cancel(f"{n}")
        for side in (rig.here, rig.peer):
            error: KVTransportError | None = side.error(f"{n}")
            same(error is None, end == "result", f"{side.name}: {error!r}")
    rig.here.message("m", b"m")
    same(rig.peer.messages(1), [b"m"], "messages")
    rig.here.result("m")
