"""Actor: does in its own process what a check tells one side to do, by name.

Here: the commands, and errors as JSON. Not here: how commands reach an Actor (`side`, `worker`).

Invariant: every argument and result is plain JSON, so that a side may be another process; only errors are raised
as they are. Nothing waits without a limit.
"""

# ruff: noqa: D102 - the commands do what the methods of Side say that have their names

from __future__ import annotations

import builtins
import ctypes
import gc
import os
import signal
from typing import Any, Final

import numpy as np

from kvtransport import errors
from kvtransport.config import Config
from kvtransport.connection import Connection
from kvtransport.endpoint import Endpoint
from kvtransport.grant import Grant, Lease
from kvtransport.memory.layout import BlockLayout, LayerGroup
from kvtransport.memory.pool import BlockPool
from kvtransport.testing.blocks import Blocks, Bytes, digests
from kvtransport.transfer import Handle, LayerGate, Transfer, wait

LIMIT_S: Final = 20.0
"""For whatever should take milliseconds."""


class Actor:
    """One side: an Endpoint, its Connection, and pools, gates and handles by the names that a check gives them."""

    def __init__(self) -> None:
        self.endpoint: Endpoint
        self.connection: Connection
        self.memory: dict[str, list[Bytes]] = {}
        self.pools: dict[str, BlockPool] = {}
        self.gates: dict[str, LayerGate] = {}
        self.handles: dict[str, Handle[Any]] = {}

    def do(self, command: str, arguments: dict[str, Any]) -> Any:
        """Run a command: one of the methods below whose name begins with do_."""
        return getattr(self, f"do_{command}")(**arguments)

    # --- the endpoint ----------------------------------------------------------------------------------------

    def do_start(self, config: dict[str, Any]) -> None:
        self.endpoint = Endpoint(Config.from_dict(config))

    def do_listen(self, address: str) -> str:
        return self.endpoint.listen(address)

    def do_incarnation(self) -> str:
        return self.endpoint.incarnation.hex()

    def do_connect(self, address: str) -> None:
        self.connection = self.endpoint.connect(address, timeout=LIMIT_S)

    def do_accept(self) -> None:
        self.connection = self.endpoint.accept(timeout=LIMIT_S)

    def do_connection_state(self) -> str:
        return self.connection.state

    def do_close_connection(self) -> None:
        self.connection.close()

    def do_close(self) -> None:
        for gate in self.gates.values():
            gate.fail("the check is over")
        if hasattr(self, "endpoint"):
            self.endpoint.close()
        for name in ("endpoint", "connection"):
            vars(self).pop(name, None)
        for named in (self.memory, self.pools, self.gates, self.handles):
            named.clear()

    def do_counts(self) -> dict[str, int]:
        gc.collect()  # what earlier checks let go of
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
        }

    def do_stats(self) -> dict[str, int]:
        return {name: self.endpoint.stats()[name] for name in ("connections", "pools")}

    def do_fork(self) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.pause()
        finally:
            os._exit(0)

    # --- memory ----------------------------------------------------------------------------------------------

    def do_pool(
        self,
        name: str,
        blocks: dict[str, int],
        form: dict[str, Any] | None = None,
        groups: dict[str, list[int]] | None = None,
        allocated: bool = False,
    ) -> None:
        spec = Blocks(**blocks)
        self.memory[name] = [self._allocated(layer) if allocated else layer for layer in spec.memory()]
        views: list[Any] = list(spec.views(self.memory[name]))
        layout = None
        if form is not None:
            layout = BlockLayout(**form, head_dim=head_dim(spec, form), dtype="uint8", kv="single")
            views = [view.reshape(spec.count, *axes(spec, form)) for view in views]
        if groups is None:
            self.pools[name] = self.endpoint.register(views, layout)
            return
        members = [LayerGroup([str(i) for i in of], layout, name=group) for group, of in groups.items()]
        named = {str(i): view for i, view in enumerate(views)}
        self.pools[name] = self.endpoint.register(named, groups=members)

    def do_fill(self, name: str, blocks: dict[str, int], value: int) -> None:
        for view in Blocks(**blocks).views(self.memory[name]):
            view[:] = value

    def do_keep_only(self, name: str, blocks: dict[str, int], ids: list[int]) -> None:
        for view in Blocks(**blocks).views(self.memory[name]):
            kept = view[ids].copy()
            view[:] = 0
            view[ids] = kept

    def do_close_pool(self, name: str) -> None:
        self.pools.pop(name).close(timeout=LIMIT_S)
        del self.memory[name]

    def do_digests(self, name: str) -> list[str]:
        return digests(self.memory[name])

    # --- transfers -------------------------------------------------------------------------------------------

    def do_send(self, handle: str, pool: str, ids: list[int], gate: str | None, **options: Any) -> None:
        options["meta"] = bytes.fromhex(options.pop("meta", ""))
        after = None if gate is None else self.gates[gate]
        self._keep(handle, self.connection.send_blocks(self.pools[pool], ids, after=after, **options))

    def do_recv(self, handle: str, pool: str, ids: list[int], **options: Any) -> None:
        options["meta"] = bytes.fromhex(options.pop("meta", ""))
        self._keep(handle, self.connection.recv_blocks(self.pools[pool], ids, **options))

    def do_refuse(self, key: str, reason: str) -> None:
        self.connection.refuse(key, reason)

    def do_grant(self, handle: str, pool: str, ids: Any, **options: Any) -> str:
        if options.get("to") == "peer":
            options["to"] = self.connection.peer
        elif options.get("to"):
            options["to"] = bytes.fromhex(options["to"])
        grant = self.pools[pool].grant(ids, **options)
        self._keep(handle, grant)
        return grant.token

    def do_read(self, handle: str, token: str, pool: str, ids: Any, **options: Any) -> None:
        self._keep(handle, self.connection.read_blocks(token, self.pools[pool], ids, **slices(options)))

    def do_write(
        self, handle: str, token: str, pool: str, ids: Any, gate: str | None, meta: str, **options: Any
    ) -> None:
        after = None if gate is None else self.gates[gate]
        post = self.connection.write_blocks
        self._keep(
            handle,
            post(token, self.pools[pool], ids, after=after, meta=bytes.fromhex(meta), **slices(options)),
        )

    def do_hold(self, handle: str, token: str, **options: Any) -> None:
        self._keep(handle, self.connection.hold(token, **options))

    def do_held(self, handle: str) -> bool:
        lease = self.handles[handle]
        assert isinstance(lease, Lease)  # for the type checker
        return lease.held

    def do_release(self, handle: str) -> None:
        lease = self.handles[handle]
        assert isinstance(lease, Lease)
        lease.release()

    def do_revoke(self, handle: str, force: bool = False) -> None:
        grant = self.handles[handle]
        assert isinstance(grant, Grant)
        grant.revoke(force=force)

    def do_reuse(self, pool: str, ids: Any) -> None:
        self.pools[pool].reuse(ids)

    def do_keep_the_interpreter(self, seconds: float) -> None:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # a PyDLL's calls keep its lock

    def do_result(self, handle: str) -> dict[str, Any]:
        result = self.handles[handle].result(LIMIT_S)
        if result is None:
            return {}
        fields = (
            "nbytes",
            "seconds",
            "backend",
            "blocks",
            "runs",
            "chunks",
            "resumed_nbytes",
            "wire_s",
            "queued_s",
        )
        return {name: getattr(result, name) for name in fields} | {"meta": result.meta.hex()}

    def do_error(self, handle: str, timeout: float) -> dict[str, Any] | None:
        asked = self.handles[handle]
        wait([asked], timeout)
        if not asked.done():
            raise AssertionError(f"{asked!r} is not over after {timeout} s\n{self.connection.explain()}")
        error = asked.exception()
        return None if error is None else error_to_json(error)

    def do_results(self, handles: list[str]) -> None:
        for handle in handles:
            self.do_result(handle)

    def do_done(self, handle: str) -> bool:
        return self.handles[handle].done()

    def do_state(self, handle: str) -> str:
        asked = self.handles[handle]
        return asked.state if isinstance(asked, Grant) else self._transfer(handle).state

    def do_progress(self, handle: str) -> list[int]:
        return list(self._transfer(handle).progress())

    def do_cancel(self, handle: str) -> None:
        self._transfer(handle).cancel()

    def do_wait_layer(self, handle: str, layer: int) -> None:
        self._transfer(handle).wait_layer(layer, timeout=LIMIT_S)

    def do_gate(self, name: str, layers: int) -> None:
        self.gates[name] = self.endpoint.layer_gate(layers)

    def do_mark(self, name: str, layer: int) -> None:
        self.gates[name].mark_ready(layer)

    def do_word(self, name: str, value: int) -> None:
        self.gates[name].word[0] = value

    def do_fail_gate(self, name: str, reason: str) -> None:
        self.gates[name].fail(reason)

    # --- messages --------------------------------------------------------------------------------------------

    def do_message(self, handle: str, data: str, after: str | None) -> None:
        transfer = None if after is None else self._transfer(after)
        self._keep(handle, self.connection.send_message(bytes.fromhex(data), after=transfer))

    def do_messages(self, count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            came = self.endpoint.recv_messages(timeout=LIMIT_S)
            if not came:
                raise AssertionError(f"{len(found)} of {count} messages came in {LIMIT_S} s")
            found += [data.hex() for connection, data in came if connection is self.connection]
        return found

    def do_messages_now(self) -> list[str]:
        return [data.hex() for _, data in self.endpoint.recv_messages()]

    def _allocated(self, content: Bytes) -> Bytes:
        memory: Any = self.endpoint.allocate(nbytes=len(content))
        made = np.frombuffer(memory, np.uint8)
        made[:] = content
        return made

    def _keep(self, name: str, handle: Handle[Any]) -> None:
        self.handles[name] = handle

    def _transfer(self, name: str) -> Transfer:
        found = self.handles[name]
        assert isinstance(found, Transfer)  # for the type checker
        return found


def head_dim(spec: Blocks, form: dict[str, Any]) -> int:
    """Return the bytes of a token and head."""
    return int(spec.nbytes // (form["tokens_per_block"] * form["num_kv_heads"]))


def axes(spec: Blocks, form: dict[str, Any]) -> tuple[int, int, int]:
    """Return the axes of a block of this form, as its tensor has them."""
    heads, tokens, dim = form["num_kv_heads"], form["tokens_per_block"], head_dim(spec, form)
    return (heads, tokens, dim) if form["order"] == "HND" else (tokens, heads, dim)


def slices(options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose slices of heads are slices."""
    names = ("heads", "src_heads", "dst_heads")
    heads: dict[str, Any] = {name: slice(*options[name]) for name in names if name in options}
    return {**options, **heads}


def error_to_json(error: BaseException) -> dict[str, Any]:
    """Return what `error_from_json` makes the same error of."""
    plain: dict[str, Any] = {"type": type(error).__name__, "text": str(error)}
    if isinstance(error, errors.TransferOutcome):
        names = [name for name in type(error).attribute_names() if name not in ("blocks", "failed_block_ids")]
        values = {name: getattr(error, name) for name in names}
        plain["attributes"] = {n: v for n, v in values.items() if isinstance(v, (str, bool, int, type(None)))}
        plain["blocks"] = [[group, list(states.items())] for group, states in error.blocks.items()]
    return plain


def error_from_json(plain: dict[str, Any]) -> BaseException:
    """Return the error, of a class of `kvtransport.errors` or of Python's own."""
    name = plain["type"]
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        return AssertionError(f"{name}: {plain['text']}")
    if issubclass(kind, errors.TransferOutcome):
        blocks = {group: dict(states) for group, states in plain["blocks"]}
        return kind(plain["text"], blocks=blocks, **plain["attributes"])
    return kind(plain["text"])
