"""The decode process: receives the prompts' KV cache into its own blocks and goes on generating over them.

Where prefill dies in mid-transfer, it computes the prompts itself, into the same blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

import torch

import kvtransport as kvt
from handoff.agreement import Inbox, encode, layout_of, megabytes, say
from handoff.checks import CheckFailed, block_digests, check_blocks, check_differs, check_equal, same_bytes
from handoff.controls import controls
from handoff.model import STEPS, Batch, Generation, decode, kv_shape, load_model, prefill, reference
from handoff.paged_cache import PagedCache, PagedMemory

Receives = Mapping[str, kvt.Transfer]


def run(endpoint: kvt.Endpoint, options: argparse.Namespace) -> None:
    connection = endpoint.accept(timeout=options.timeout)
    inbox = Inbox(endpoint, options.timeout)
    model = load_model(options.model, options.threads)
    prompts = inbox.take("prompts", 1)[0]["prompts"]
    batch = Batch.of(list(prompts.values()))
    shape = kv_shape(model)
    lengths = {key: len(prompt) for key, prompt in prompts.items()}
    # Filled with NaN: a byte that doesn't arrive can't go unnoticed.
    memory = PagedMemory(shape, lengths, room=STEPS, spare=96, seed=2, fill=float("nan"))
    say(f"req-0: {lengths['req-0']} tokens, into blocks {memory.prompt_ids['req-0']} of this side")

    with endpoint.register(memory.tensors, layout_of(shape), name="decode-kv") as pool:
        receives = post(connection, pool, memory, options.timeout)
        connection.send_message(encode("posted")).result(options.timeout)
        try:
            landed_at = watch(receives, shape.num_layers)
            first = confirm(receives, inbox, memory, landed_at)
            repeat(connection, pool, memory, options.timeout)
        except kvt.PeerLost as error:
            if not options.kill_prefill:
                raise
            report_loss(error, receives, memory)
            first = prefill(model, batch, PagedCache(memory))
            say("computed the prompts here instead, into the same blocks")
        else:
            if options.kill_prefill:
                raise CheckFailed("prefill was to be killed in mid-transfer, but everything arrived")
    verify_tokens(model, batch, memory, first)


def post(
    connection: kvt.Connection, pool: kvt.BlockPool, memory: PagedMemory, timeout: float, suffix: str = ""
) -> Receives:
    """One receive per request, all at once, each straight into the blocks that this side has for it."""
    return {
        key: connection.recv_blocks(pool, ids, key=key + suffix, timeout_s=timeout)
        for key, ids in memory.prompt_ids.items()
    }


def watch(receives: Receives, num_layers: int) -> float:
    """Follows the layers in, as an engine would that computes with them; returns when the last was here."""
    started = time.monotonic()
    for layer in range(num_layers):
        for transfer in receives.values():
            transfer.wait_layer(layer)
        landed = sum(transfer.progress()[0] for transfer in receives.values())
        elapsed = time.monotonic() - started
        say(f"layer {layer + 1} of {num_layers} is here for all: {megabytes(landed)} after {elapsed:.2f} s")
    return time.monotonic()


def confirm(receives: Receives, inbox: Inbox, memory: PagedMemory, landed_at: float) -> torch.Tensor:
    """Compares every block with prefill's digest of its own; returns the requests' first tokens."""
    results = {key: transfer.result() for key, transfer in receives.items()}
    messages = {message["key"]: message for message in inbox.take("prefilled", len(receives))}
    for key, result in results.items():
        if result.meta != str(memory.lengths[key]).encode():
            raise CheckFailed(f"{key}: meta should say {memory.lengths[key]} tokens, it is {result.meta!r}")
    nbytes = sum(result.nbytes for result in results.values())
    seconds = max(result.seconds for result in results.values())
    backends = ", ".join(sorted({result.backend for result in results.values()}))
    say(f"received {len(results)} requests, {sum(memory.lengths.values())} tokens, {megabytes(nbytes)}")
    say(f"streamed in {seconds:.2f} s over {backends}, as prefill computed")
    # Both processes read the same monotonic clock: they run on one host.
    lead = messages[next(iter(receives))]["computed_at"] - landed_at
    when = f"{abs(lead) * 1e3:.0f} ms {'before' if lead > 0 else 'after'}"
    say(f"the last layer was here {when} prefill had its first tokens")
    received = {key: block_digests(memory.tensors, ids) for key, ids in memory.prompt_ids.items()}
    compared = check_blocks(received, {key: message["digests"] for key, message in messages.items()})
    blocks = sum(len(ids) for ids in memory.prompt_ids.values())
    say(f"bytes equal: yes ({compared} pieces: {blocks} blocks in each of {len(memory.tensors)} layers)")
    return torch.tensor([messages[key]["token"] for key in receives])


def repeat(connection: kvt.Connection, pool: kvt.BlockPool, memory: PagedMemory, timeout: float) -> None:
    """The same blocks with nothing to wait for: the first hand-off takes as long as prefill computes."""
    before = [blocks.clone() for blocks in memory.tensors]
    started = time.monotonic()
    transfers = post(connection, pool, memory, timeout, suffix="/2")
    results = [transfer.result() for transfer in transfers.values()]
    seconds = time.monotonic() - started
    nbytes = sum(result.nbytes for result in results)
    rate = f"{megabytes(nbytes)} in {seconds * 1e3:.1f} ms, {nbytes / seconds / 1e9:.2f} GB/s"
    say(f"once more, with every layer ready: {rate} over {results[0].backend}")
    if not same_bytes(memory.tensors, before):
        raise CheckFailed("the second hand-off brought other bytes")


def report_loss(error: kvt.PeerLost, receives: Receives, memory: PagedMemory) -> None:
    """Shows what a caller learns from the error, and checks that every transfer has ended with it."""
    kvt.wait(list(receives.values()), timeout=10)
    landed = sum(transfer.progress()[0] for transfer in receives.values())
    total = sum(transfer.progress()[1] for transfer in receives.values())
    say(f"PeerLost: {error}")
    share = f"{megabytes(landed)} of {megabytes(total)}"
    say(f"cause {error.cause}, retryable {error.retryable}, {share} were here")
    if not 0 < landed < total:
        raise CheckFailed(f"prefill was not killed in mid-transfer: {landed} of {total} bytes were here")
    for key, transfer in receives.items():
        loss = transfer.exception()
        if not isinstance(loss, kvt.PeerLost) or not loss.quiesced:
            raise CheckFailed(f"{key} should end in PeerLost and be quiesced: {loss!r}")
        # A block is whole when all its layers are, and the last layer was never sent.
        if set(loss.failed_block_ids) != set(memory.prompt_ids[key]):
            raise CheckFailed(f"{key}: the error counts only blocks {loss.failed_block_ids} as not received")
    # Quiesced: no byte of a transfer can land any more, so its blocks may be written anew at once.
    say(f"all {len(receives)} transfers have ended, are quiesced, and count none of their blocks as received")


def verify_tokens(model: Any, batch: Batch, memory: PagedMemory, first: torch.Tensor) -> None:
    """Generates over the blocks, compares with a stock run, then damages the blocks: now it must differ."""

    def generate() -> Generation:
        return decode(model, batch, PagedCache(memory, length=batch.width), first)

    whole = [blocks.clone() for blocks in memory.tensors]  # generating writes behind the prompts
    want = reference(model, batch)
    got = generate()
    check_equal(got, want)
    say(f"logits equal, bit by bit, to a run without hand-off: yes ({STEPS} steps, {got.logits.dtype})")
    for control in controls(memory):
        for blocks, saved in zip(memory.tensors, whole, strict=True):
            blocks.copy_(saved)
        control.damage()
        changed = check_differs(control.name, generate(), want, control.rows)
        say(f"control, {control.name}: {len(control.rows)} requests differ, as they must ({changed} tokens)")
    say(f"req-0 goes on with tokens {got.tokens[0].tolist()}")
    say(f"tokens equal: yes ({len(first)} requests)")
