"""What users and peers have named, in messages: readable, and nothing that a terminal obeys."""

import numpy as np
import pytest

from kvtransport.errors import LocalProtocolError, PeerAborted, TransferCancelled

KEYS = [
    pytest.param(b"\xff\xfe", r"\xff\xfe", id="not-utf8"),
    pytest.param(b"caf\xc3\xa9\xff", r"café\xff", id="partly-utf8"),
    pytest.param("busy\x1b[31m\n", r"busy\x1b[31m\x0a", id="controls"),
    pytest.param("a\x9b31mb", r"a\x9b31mb", id="c1-controls"),
    pytest.param("gr\u00fcn \u7d75", "gr\u00fcn \u7d75", id="readable"),
]


@pytest.fixture
def link(endpoint):
    ours, theirs = endpoint(), endpoint()
    connection = ours.connect(theirs.listen("127.0.0.1:0"))
    return connection, theirs.accept(), ours.register(np.zeros((4, 64), np.uint8))


@pytest.mark.parametrize(("key", "shown"), KEYS)
def test_a_key_in_a_message(link, key, shown):
    connection, accepted, pool = link
    transfer = connection.recv_blocks(pool, [0], key=key)
    for name, post in {
        "in use": lambda: connection.recv_blocks(pool, [1], key=key),
        "overlap": lambda: connection.recv_blocks(pool, [0], key="other"),
    }.items():
        with pytest.raises(LocalProtocolError) as caught:
            post()
        assert f"'{shown}'" in str(caught.value), name
    accepted.refuse(key, "no\x1b[0m")
    with pytest.raises(PeerAborted) as aborted:
        transfer.result(20)
    assert f"'{shown}'" in str(aborted.value)
    assert str(aborted.value).endswith(r"no\x1b[0m")
    assert aborted.value.key == key


def test_a_gates_reason(link):
    connection, _, pool = link
    gate = connection._endpoint.layer_gate(1)
    transfer = connection.send_blocks(pool, [0], key="k", after=gate)
    gate.fail("out of\x1b]0;memory\x07")
    with pytest.raises(TransferCancelled) as caught:
        transfer.result(20)
    assert r"out of\x1b]0;memory\x07" in str(caught.value)
