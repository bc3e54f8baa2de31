"""Every form in which block ids may come, and exactly which blocks they name; what isn't one raises at the call.

A block's bytes are its number, so what lands says which ids were understood.
"""

import array
import types
from collections import ChainMap, UserDict, deque
from collections.abc import Mapping

import numpy as np
import pytest
import torch

import kvtransport as kvt

BLOCKS, LIMIT_S = 8, 20


class Link:
    """Two endpoints of this process: `named` sends the ids to places 0, 1, ... and says which blocks came."""

    def __init__(self):
        config = kvt.Config(backends=("inproc",))
        self.ours, self.theirs = kvt.Endpoint(config), kvt.Endpoint(config)
        self.out = self.ours.connect("inproc:" + self.theirs.incarnation.hex(), timeout=LIMIT_S)
        self.back = self.theirs.accept(LIMIT_S)
        self.source = {name: np.arange(BLOCKS, dtype=np.int64).reshape(BLOCKS, 1) for name in "ab"}
        self.landed = {name: np.full((BLOCKS, 1), -1, dtype=np.int64) for name in "ab"}
        groups = [kvt.LayerGroup(["a"], name="a"), kvt.LayerGroup(["b"], name="b")]
        self.one, self.into = self.ours.register(self.source["a"]), self.theirs.register(self.landed["a"])
        self.two = self.ours.register(self.source, groups=groups)
        self.into_two = self.theirs.register(self.landed, groups=groups)

    def named(self, ids, count=None):
        places = range(len(ids) if count is None else count)
        sent = self.out.send_blocks(self.one, ids, key="k")
        self.back.recv_blocks(self.into, places, key="k").result(LIMIT_S)
        sent.result(LIMIT_S)
        return self.landed["a"][places, 0].tolist()

    def named_by_group(self, ids, counts):
        """Return the blocks that came, by group, for sent {group: ids}."""
        sent = self.out.send_blocks(self.two, ids, key="k")
        self.back.recv_blocks(self.into_two, {g: range(n) for g, n in counts.items()}, key="k").result(
            LIMIT_S
        )
        sent.result(LIMIT_S)
        return {name: self.landed[name][:n, 0].tolist() for name, n in counts.items()}

    def close(self):
        self.ours.close()
        self.theirs.close()


@pytest.fixture(scope="module")
def link():
    made = Link()
    yield made
    made.close()


def refused(link, ids, error, words, pool=None):
    with pytest.raises(error, match=words) as caught:
        link.out.send_blocks(pool or link.one, ids, key="k")
    assert type(caught.value) is error
    assert link.named([3, 0]) == [3, 0]  # nothing is left of the call


def unaligned(values, dtype):
    """An array whose integers begin at odd addresses."""
    made = np.frombuffer(b"?" + np.array(values, dtype).tobytes(), np.uint8, offset=1).view(dtype)
    assert made.ctypes.data % made.itemsize
    return made


def field(values):
    """An array whose stride is no multiple of its integers."""
    made = np.zeros(len(values), dtype=[("tag", "u1"), ("id", "<i8")])
    made["id"] = values
    return made["id"]


def read_only(values):
    made = np.array(values)
    made.flags.writeable = False
    return made


IDS = [5, 0, 7, 7, 2]
FORMS = {
    "list": IDS,
    "tuple": tuple(IDS),
    "deque": deque(IDS),
    "numpy's integers": [np.int32(i) for i in IDS],
    "int64": np.array(IDS),
    "int32": np.array(IDS, dtype=np.int32),
    "read-only": read_only(IDS),
    "torch": torch.tensor(IDS),
    "torch int32": torch.tensor(IDS, dtype=torch.int32),
    "array.array": array.array("q", IDS),
    "every second": np.repeat(IDS, 2)[::2],
    "backwards": np.array(IDS[::-1])[::-1],
    "a column": np.tile(np.array(IDS)[:, None], 3)[:, 1],
    "torch's every third": torch.tensor(IDS).repeat_interleave(3)[::3],
    "unaligned int64": unaligned(IDS, np.int64),
    "unaligned int32": unaligned(IDS, np.int32),
    "every second, unaligned": unaligned(np.repeat(IDS, 2), np.int64)[::2],
    "a field": field(IDS),
    "big-endian": np.array(IDS, dtype=">i8"),
    "big-endian int32": np.array(IDS, dtype=">i4"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_same_ids(link, form):
    assert link.named(FORMS[form]) == IDS


@pytest.mark.parametrize("ids", [range(2, 5), range(7, -1, -3), range(3, 4), range(6, 7, 10**30)], ids=repr)
def test_ranges(link, ids):
    assert link.named(ids) == list(ids)


@pytest.mark.parametrize(
    "ids",
    [[], (), range(0), range(5, 5), range(10**30, 0), np.zeros(0, np.int64), np.zeros(0, np.int32)[::-1]]
    + [torch.zeros(0, dtype=torch.int64), {"group0": []}, {}],
    ids=repr,
)
def test_no_ids_at_all(link, ids):
    assert link.named(ids, count=0) == []


WRONG = [
    (np.array([-1]), ValueError, "-1 is out of range"),
    (np.array([3, -(2**31)], dtype=np.int32), ValueError, "-2147483648 is out of range"),
    (unaligned([3, -2], np.int64), ValueError, "-2 is out of range"),
    (np.array([-3, 1], dtype=">i8"), ValueError, "-3 is out of range"),
    (field([2**32]), ValueError, "4294967296 is out of range"),
    (np.array([2**32]), ValueError, "4294967296 is out of range"),
    (np.array([1, BLOCKS]), ValueError, "no block 8 .position 1.: it has num_blocks=8"),
    ([0, 1 << 70], ValueError, f"^block id {1 << 70} is out of range"),
    ([-(1 << 70)], ValueError, f"^block id -{1 << 70} is out of range"),
    (range(BLOCKS + 1), ValueError, "8 is out of range: num_blocks=8"),
    (range(2**32 - 1), ValueError, "num_blocks=8"),  # at once: a list of them would be 16 GiB
    (range(2**32 - 1, -1, -1), ValueError, "num_blocks=8"),
    (np.array([2**63], dtype=np.uint64), TypeError, "int32 or int64"),
    (np.array([0], dtype=np.uint64), TypeError, "int32 or int64"),
    (np.array([0], dtype=np.int16), TypeError, "int32 or int64"),
    (np.array([True]), TypeError, "int32 or int64"),
    (torch.tensor([True]), TypeError, "int32 or int64"),
    (np.array([]), TypeError, "int32 or int64"),  # of float64
    (bytearray(b"\0"), TypeError, "int32 or int64"),
    (np.array([[0, 1]]), ValueError, "one dimension"),
    (np.array([[0, 1]], dtype=">i8"), TypeError, "integer scalar"),
    (np.array(3), ValueError, "one dimension"),
    (np.zeros((0, 2), np.int64), ValueError, "one dimension"),
    ([np.int64(-1)], ValueError, "out of range"),
    ([np.True_], TypeError, "."),
    ({1, 2}, TypeError, "a set has none"),
    (frozenset({1}), TypeError, "a set has none"),
    (None, TypeError, "block ids are a sequence of int"),
    (3, TypeError, "block ids are a sequence of int"),
]


@pytest.mark.parametrize(("ids", "error", "words"), WRONG, ids=lambda one: repr(one)[:40])
def test_what_names_no_blocks(link, ids, error, words):
    refused(link, ids, error, words)


# --- by group ---


class Ours(Mapping):
    def __init__(self, of):
        self.of = of

    def __getitem__(self, name):
        return self.of[name]

    def __iter__(self):
        return iter(self.of)

    def __len__(self):
        return len(self.of)


@pytest.mark.parametrize("form", [dict, types.MappingProxyType, UserDict, ChainMap, Ours])
def test_any_mapping_names_groups(link, form):
    ids = form({"b": [6, 1], "a": np.array([4])})
    assert link.named_by_group(ids, {"a": 1, "b": 2}) == {"a": [4], "b": [6, 1]}
    assert link.named_by_group(form({"b": range(3)}), {"b": 3}) == {"b": [0, 1, 2]}
    refused(link, form({"c": [0]}), ValueError, "no group 'c'", link.two)
    refused(link, form({"a": [0], 1: [0]}), TypeError, "a name is a str", link.two)
    refused(link, form({"a": {"b": [0]}}), TypeError, ".", link.two)


def test_a_pool_of_several_groups_has_no_ids_without_a_name(link):
    for ids in ([0], range(1), np.array([0])):
        refused(link, ids, ValueError, "several groups", link.two)


class OddItems(Ours):
    def __init__(self, items):
        super().__init__({"a": [0]})
        self.odd = items

    def items(self):
        return self.odd


@pytest.mark.parametrize("items", [[("a",)], [["a", [0]]], ["ab"], [None], 3, None])
def test_a_mapping_with_odd_items(link, items):
    refused(link, OddItems(items), TypeError, ".", link.two)


def test_a_mapping_that_raises(link):
    class Broken(Ours):
        def __getitem__(self, name):
            raise LookupError(f"no {name} today")

    refused(link, Broken({"a": [0]}), LookupError, "no a today", link.two)


# --- code that runs while the ids are read ---


class Acts:
    """An integer that does something when it is asked for its value."""

    def __init__(self, act, value=0):
        self.act, self.value = act, value

    def __index__(self):
        self.act()
        return self.value


@pytest.mark.parametrize("act", ["clear", "pop", "append", "extend"])
def test_a_list_that_changes_while_it_is_read(link, act):
    ids = []
    acts = {"append": lambda: ids.append(0), "extend": lambda: ids.extend(range(10_000))}
    ids += [0, Acts(acts.get(act, lambda: getattr(ids, act)())), *range(5000)]
    with pytest.raises(ValueError, match="changed while"):
        link.out.send_blocks(link.one, ids, key="k")
    assert link.named([4]) == [4]


def test_an_item_that_is_replaced_while_it_is_read(link):
    ids = [0, 0, 0]

    def act():
        ids[1:] = [5, 6]  # frees the item that is asked

    ids[1] = Acts(act, 3)
    assert link.named(ids) == [0, 3, 6]


def test_a_mapping_that_changes_while_it_is_read(link):
    ids = {}
    ids["a"] = [Acts(ids.clear, 2)]
    ids["b"] = [7]
    assert link.named_by_group(ids, {"a": 1, "b": 1}) == {"a": [2], "b": [7]}


def test_an_item_that_raises(link):
    def act():
        raise ZeroDivisionError("no value")

    refused(link, [0, Acts(act)], ZeroDivisionError, "no value")
