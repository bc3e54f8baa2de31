"""The prefill process: computes the prompts' KV cache and sends each layer as soon as it is computed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

import kvtransport as kvt
from handoff.agreement import Inbox, encode, layout_of, megabytes, say
from handoff.checks import block_digests
from handoff.model import Batch, kv_shape, load_model, make_prompts, prefill
from handoff.paged_cache import PagedCache, PagedMemory


def run(endpoint: kvt.Endpoint, options: argparse.Namespace) -> None:
    connection = endpoint.connect(options.connect, timeout=options.timeout)
    model = load_model(options.model, options.threads)
    prompts = make_prompts(model)
    connection.send_message(encode("prompts", prompts=prompts)).result(options.timeout)
    shape = kv_shape(model)
    lengths = {key: len(prompt) for key, prompt in prompts.items()}
    memory = PagedMemory(shape, lengths, room=0, spare=64, seed=1, fill=0.0)
    say(f"{type(model).__name__}, {shape.num_layers} layers of {shape.num_kv_heads} KV heads, {shape.dtype}")
    say(f"req-0: {lengths['req-0']} tokens, in blocks {memory.prompt_ids['req-0']} of this side")

    with endpoint.register(memory.tensors, layout_of(shape), name="prefill-kv") as pool:
        gate = endpoint.layer_gate(shape.num_layers)  # one for all: the batch goes through a layer together
        sends = {
            key: connection.send_blocks(pool, ids, key=key, after=gate, meta=str(lengths[key]).encode())
            for key, ids in memory.prompt_ids.items()
        }
        # Not needed to be right: either side may be first. It makes the demo show layers that arrive while others
        # are computed, however late decode was started.
        Inbox(endpoint, options.timeout).take("posted", 1)
        first = compute(model, Batch.of(list(prompts.values())), memory, gate, options.layer_delay)
        computed_at = time.monotonic()
        say(f"computed {sum(lengths.values())} tokens of {len(lengths)} requests")
        messages = announce(connection, memory, sends, first, computed_at)
        moved = sum(send.result(options.timeout).nbytes for send in sends.values())
        say(f"decode has all {megabytes(moved)}")
        again = [connection.send_blocks(pool, ids, key=f"{key}/2") for key, ids in memory.prompt_ids.items()]
        for message in messages:
            message.result(options.timeout)
        for send in again:
            send.result(options.timeout)


def compute(
    model: Any, batch: Batch, memory: PagedMemory, gate: kvt.LayerGate, layer_delay: float
) -> list[int]:
    """One forward pass over all prompts; a layer's KV is on its way while the next layer is computed."""

    def release(layer: int) -> None:
        gate.mark_ready(layer)
        time.sleep(layer_delay)  # stands for a bigger model's next layer; 0 unless asked for

    try:
        first: list[int] = prefill(model, batch, PagedCache(memory, on_layer_stored=release)).tolist()
    except BaseException as error:
        gate.fail(f"prefill failed: {error!r}")  # decode hears of it now, not when its patience ends
        raise
    return first


def announce(
    connection: kvt.Connection,
    memory: PagedMemory,
    sends: Mapping[str, kvt.Transfer],
    first: list[int],
    computed_at: float,
) -> list[kvt.SentMessage]:
    """A message per request: its first token and its blocks' digests, sent when its blocks have arrived."""
    handles = []
    for (key, send), token in zip(sends.items(), first, strict=True):
        digests = block_digests(memory.tensors, memory.prompt_ids[key])
        message = encode("prefilled", key=key, token=token, digests=digests, computed_at=computed_at)
        handles.append(connection.send_message(message, after=send))
    return handles
