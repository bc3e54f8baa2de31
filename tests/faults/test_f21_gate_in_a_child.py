"""F21: what a forked child does with a gate, or lets go of, reaches none of its descriptors, nor the parent's peer."""

import subprocess
import sys

import numpy as np

from kvtransport import Config, Endpoint

LIMIT_S = 20

SCRIPT = """
import gc, os, socket, sys
import numpy as np
import kvtransport as kvt

endpoint = kvt.Endpoint(kvt.Config(backends=("tcp",)))
connection = endpoint.connect(sys.argv[1], timeout=20)
pool = endpoint.register(np.full((4, 65536), 7, np.uint8))
gates = [endpoint.layer_gate(1) for _ in range(3)]
sent = [connection.send_blocks(pool, [i], key=f"k{i}", after=gate) for i, gate in enumerate(gates)]
connection.send_message(b"posted").result(20)
while any(transfer.state == "posted" for transfer in sent):
    pass
pid = os.fork()
if pid == 0:
    # They take the numbers that were the endpoint's.
    pairs = [socket.socketpair() for _ in range(20)]
    foreign = 0
    for call in (lambda: gates[0].mark_ready(0), lambda: gates[1].fail("a child's word")):
        try:
            call()
            foreign += 1
        except kvt.ForkedProcessError:
            pass
    del sent, connection, pool, endpoint, gates
    gc.collect()
    for pair in pairs:
        for one in pair:
            one.setblocking(False)
            try:
                one.recv(65536)
                foreign += 1  # bytes, or an end
            except BlockingIOError:
                pass
        pair[0].sendall(b"open")
        foreign += pair[1].recv(4) != b"open"
    os._exit(foreign)
_, status = os.waitpid(pid, 0)
for gate in gates:
    gate.mark_ready(0)
print(os.waitstatus_to_exitcode(status), [transfer.result(20).nbytes for transfer in sent])
endpoint.close()
"""


def test_f21_a_gate_in_a_child():
    """The parent's transfers end as if there were no child."""
    with Endpoint(Config(backends=("tcp",))) as endpoint:
        where = endpoint.listen("127.0.0.1:0")
        pool = endpoint.register(np.zeros((4, 65536), np.uint8))
        command = [sys.executable, "-c", SCRIPT, where]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            connection = endpoint.accept(timeout=LIMIT_S)
            got = [connection.recv_blocks(pool, [i], key=f"k{i}") for i in range(3)]
            assert endpoint.recv_messages(LIMIT_S)
            said = process.communicate(timeout=LIMIT_S)[0]
            assert said == "0 [65536, 65536, 65536]\n"
            assert [transfer.result(LIMIT_S).nbytes for transfer in got] == [65536] * 3
