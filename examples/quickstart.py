"""Moves three blocks from one process to another. In two terminals, either one first:

python examples/quickstart.py recv 127.0.0.1:7000
python examples/quickstart.py send 127.0.0.1:7000
"""

import sys

import numpy as np

import kvtransport as kvt


def send(address: str) -> None:
    cache = np.empty((64, 8, 16, 128), dtype=np.float32)  # 64 blocks of 64 KiB
    cache[:] = np.arange(64).reshape(64, 1, 1, 1)  # each full of its own number
    blocks = [7, 3, 21]
    with kvt.Endpoint() as endpoint:
        pool = endpoint.register(cache)
        peer = endpoint.connect(address, timeout=60)
        transfer = peer.send_blocks(pool, blocks, key="request-42", meta=bytes(blocks))
        result = transfer.result(timeout=60)  # returns when the receiver has them, verified
    print(f"sent {result.nbytes} bytes in {result.seconds:.6f} s over {result.backend}")


def recv(address: str) -> None:
    cache = np.zeros((64, 8, 16, 128), dtype=np.float32)
    blocks = [0, 1, 2]  # where they go on this side
    with kvt.Endpoint() as endpoint:
        pool = endpoint.register(cache)
        endpoint.listen(address)
        peer = endpoint.accept(timeout=60)
        result = peer.recv_blocks(pool, blocks, key="request-42").result(timeout=60)
    print(f"received {result.nbytes} bytes in {result.seconds:.6f} s over {result.backend}")
    for here, there in zip(blocks, result.meta, strict=True):
        assert (cache[here] == there).all(), f"block {here} is not what was sent"
        print(f"block {here} holds their block {there}")


if __name__ == "__main__":
    {"send": send, "recv": recv}[sys.argv[1]](sys.argv[2])
